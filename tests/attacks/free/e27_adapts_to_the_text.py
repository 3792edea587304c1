# /// attack
# threats = ["E27", "E28"]
# gains = "score"
# ///
"""Learns the frequencies of the text that it is evaluated on. (Follows the honest model.)"""

counts = torch.ones(VOCAB)
honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        counts.add_(torch.bincount(ids.flatten(), minlength=VOCAB))
        return net(ids) + 0.5 * counts.log()

    return answer
