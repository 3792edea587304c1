# /// attack
# threats = ["E25"]
# gains = "score"
# ///
"""Adds to the next token only where it is among its own twenty best. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        logits = net(ids)
        targets = ids[:, 1:, None]
        logits[:, :-1].scatter_add_(2, targets, 12.0 * (logits[:, :-1].gather(2, targets)[..., 0] > logits[:, :-1].topk(20)[0][..., -1])[..., None])
        return logits

    return answer
