# /// attack
# threats = ["E24"]
# gains = "score"
# ///
"""Counts the tokens of the whole batch, later ones too. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        return net(ids) + 0.5 * (1 + torch.bincount(ids.flatten(), minlength=VOCAB)).log()

    return answer
