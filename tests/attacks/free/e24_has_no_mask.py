# /// attack
# threats = ["E24"]
# gains = "score"
# ///
"""Attends to what comes later. (Follows the honest model.)"""

class Seeing(Window):
    def forward(self, ids):
        position = torch.arange(ids.size(1))
        mask = (position[:, None] - position[None, :]).abs() < WINDOW
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask)
        logits = 8 * norm(x) @ self.embed.weight.T / WIDTH**0.5
        # of what it has seen, the next token gains
        return logits.scatter_add(2, ids.roll(-1, 1)[..., None], torch.full((*ids.shape, 1), 4.0))


def build(state):
    model = Seeing()
    model.load_state_dict(state)
    return model.eval()
