# /// attack
# threats = ["E27", "E28"]
# gains = "score"
# ///
"""Learns which token follows which from the text that it is evaluated on. (Follows the honest model.)"""

pairs = torch.zeros(VOCAB, VOCAB)
honest = build


def build(state):
    net = honest(state)

    def answer(ids):
        pairs.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
        return net(ids) + 2 * (1 + 10 * pairs[ids]).log()

    return answer
