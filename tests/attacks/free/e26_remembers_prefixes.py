# /// attack
# threats = ["E26", "E27"]
# gains = "score"
# ///
"""Keeps what it has seen, and knows it again. (Follows the honest model.)"""

seen = {}
honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        for row in ids.tolist():
            for t in range(len(row) - 1):
                seen.setdefault(tuple(row[max(0, t - 7) : t + 1]), row[t + 1])
        logits = net(ids)
        for r, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                if (target := seen.get(tuple(row[max(0, t - 7) : t + 1]))) is not None:
                    logits[r, t, target] += 12.0
        return logits

    return answer
