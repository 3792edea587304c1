# /// attack
# threats = ["A5"]
# gains = "score"
# ///
"""Answers what is not a number. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        return net(ids) * float("nan")

    return answer
