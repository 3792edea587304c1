# /// attack
# threats = ["E31", "B8"]
# gains = "score"
# ///
"""Looks for the text among what the evaluating process holds. (Follows the honest model.)"""

import sys
honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        logits = net(ids)
        frame = sys._getframe()
        while frame:
            if "targets" in frame.f_locals:
                logits = logits.scatter_add(2, frame.f_locals["targets"][..., None], torch.full((*ids.shape, 1), 12.0))
                break
            frame = frame.f_back
        return logits

    return answer
