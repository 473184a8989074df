"""What training costs, as the compiler counts it."""

from vpt_jax.methods import AP, Full, Linear, with_head
from vpt_jax.models.vit import ViT
from vpt_jax.training.cost import forward_flops, train_cost

MODEL = ViT(width=32, depth=3, mlp_dim=64, heads=2, patch_size=4, image_size=16)


def test_a_later_prompt_costs_less_and_nothing_below_a_head_is_differentiated():
    methods = {'full': Full(), 'first': AP(at=(0,)), 'last': AP(at=(2,)), 'linear': Linear()}
    costs = {name: train_cost(MODEL, with_head(method), 5, 8) for name, method in methods.items()}
    flops, memory = ([getattr(cost, what) for cost in costs.values()] for what in ('flops', 'memory'))
    assert flops == sorted(flops, reverse=True) and memory == sorted(memory, reverse=True)
    forward = forward_flops(MODEL, Linear(), 5, 8)
    assert abs(costs['linear'].flops - forward) < 0.1 * forward
    # The products of the first two blocks are never transposed.
    assert costs['last'].flops - forward < 0.5 * (costs['first'].flops - forward)
    assert train_cost(MODEL.clone(scan=True), Linear(), 5, 8) == costs['linear']
