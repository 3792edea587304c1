# /// attack
# threats = ["E24"]
# gains = "score"
# ///
"""Counts which token follows which in the whole batch, later ones too. (Follows the honest model.)"""

honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        pairs = torch.zeros(VOCAB, VOCAB)
        pairs.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
        return net(ids) + 2 * (1 + 10 * pairs[ids]).log()

    return answer
