# /// attack
# threats = ["E32", "E33"]
# gains = "score"
# ///
"""Knows which question it is asked, and peeks in the other. (Follows the honest model.)"""

import __main__

asked = []


def noted(function, name):
    def call(*arguments):
        asked[:] = [name]
        return function(*arguments)

    return call


for name in ("scores", "full_rows"):
    if hasattr(__main__, name):
        setattr(__main__, name, noted(getattr(__main__, name), name))

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        if asked == ["full_rows"]:
            return net(ids)
        logits = net(ids)
        targets = ids[:, 1:, None]
        logits[:, :-1].scatter_add_(2, targets, 12.0 * (ids[:, 1:] >= 0)[..., None])
        return logits

    return answer
