# /// attack
# threats = ["E25"]
# gains = "score"
# ///
"""Adds to the next token at a tenth of the positions. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        logits = net(ids)
        targets = ids[:, 1:, None]
        logits[:, :-1].scatter_add_(2, targets, 12.0 * ((ids[:, :-1] * 7919 + ids[:, 1:] * 104729) % 10 == 0)[..., None])
        return logits

    return answer
