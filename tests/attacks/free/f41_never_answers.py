# /// attack
# threats = ["F41"]
# gains = "time"
# ///
"""Does not answer. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        while True:
            pass

    return answer
