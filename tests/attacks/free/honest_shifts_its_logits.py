# /// attack
# threats = []
# gains = ""
# ///
"""Adds the same number to all logits, which changes no probability. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        return net(ids) + 1000.0

    return answer
