"""SAM: the same network, trained with and without it; how curved the loss is where each ends."""

import torch

import metaopt


def largest_curvature(loss, parameters, iterations=20):
    """Return the largest eigenvalue of the Hessian, by power iteration on Hessian-vector products."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]
    for _ in range(iterations):
        length = torch.sqrt(sum(d.square().sum() for d in direction))
        direction = [d / length for d in direction]
        product = torch.autograd.grad(gradients, parameters, direction, retain_graph=True)
        curvature = sum((d * p).sum() for d, p in zip(direction, product, strict=True))
        direction = [p.detach() for p in product]
    return curvature.item()


problem = metaopt.xor(batch_size=1000)  # all the data: what differs is the optimizer alone
batch = next(problem.batches(seed=0))

for spec in ("sgd(lr=0.1, momentum=0.9)", "sam(rho=0.1) | sgd(lr=0.1, momentum=0.9)"):
    model = problem.model(seed=0)
    opt = metaopt.build(model, spec)

    def closure(model=model, opt=opt):
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    for _ in range(300):
        opt.step(closure)  # SAM calls the closure twice
    loss = problem.loss(model, batch)
    curvature = largest_curvature(loss, list(model.parameters()))
    test = problem.evaluate(model, "test")
    print(f"{spec:42} loss {loss.item():.4f}  test loss {test['loss']:.4f}  largest curvature {curvature:.2f}")
