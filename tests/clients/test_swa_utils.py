"""torch.optim.swa_utils averages a model that a stack trains, as it does over the bare optimizer."""

import torch
from small_runs import assert_same_weights, loss_of, small_model, train, weights
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import metaopt

SPEC = "lookahead(k=2, alpha=1.0)"


def test_an_averaged_model_and_its_rate_are_those_of_the_bare_optimizer() -> None:
    averages = []
    for wrapped in (True, False):
        model = small_model()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = metaopt.wrap(base, SPEC) if wrapped else base
        average, rate = AveragedModel(model), SWALR(opt, swa_lr=0.01, anneal_epochs=4)

        def after(model: torch.nn.Module = model, average: AveragedModel = average, rate: SWALR = rate) -> None:
            average.update_parameters(model)
            rate.step()

        train(model, opt, range(9), after=after)
        assert opt.param_groups[0]["lr"] == 0.01
        assert int(average.n_averaged) == 9
        averages.append(average)
    assert_same_weights(*averages)


def test_torch_s_moving_average_agrees_with_the_ema_of_the_stack() -> None:
    model = small_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)  # the first call copies: here the weights before the first update
    opt = metaopt.build(model.named_parameters(), "sgd(lr=0.1) | ema(0.9)")
    train(model, opt, range(9), after=lambda: average.update_parameters(model))
    with opt.averaged():
        torch.testing.assert_close(weights(model), weights(average.module), rtol=1e-6, atol=1e-7)


def test_slow_weights_can_be_averaged_and_their_statistics_made_anew() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    opt = metaopt.build(model.named_parameters(), "sgd(lr=0.1) | lookahead(k=5)")
    average = AveragedModel(model)
    train(model, opt, range(3))
    with opt.averaged():
        average.update_parameters(model)
    slow = [opt.state[p]["lookahead.slow"] for p in model.parameters()]
    torch.testing.assert_close(weights(average.module), slow, rtol=0, atol=0)
    before = average.module[1].running_mean.clone()
    update_bn([torch.randn(8, 3) for _ in range(4)], average)
    assert not torch.equal(average.module[1].running_mean, before)
    assert torch.isfinite(loss_of(average, 0))
