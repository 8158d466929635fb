"""Both parts of a model whose weights are split, in one process: a thread for each, one of which runs at a time.

The sums that they would take over processes are taken here, so that a test sees what each part computes, with core's
blocks or with Fast Blocks in Triton's interpreter, which is not made for threads that run at the same time.
"""

import threading

import torch

from flux2_pack.attention.parallel.mesh import Mesh

WAIT_S = 600


class InTurn:
    """What the threads share: who may compute, and the tensors that are to be added."""

    def __init__(self, size):
        self.turn, self.here, self.given = threading.Lock(), threading.Barrier(size, timeout=WAIT_S), {}


class OneOf(Mesh):
    """The Mesh of one thread."""

    def join(self, shared):
        self.shared = shared
        return self

    def add(self, tensor):
        shared = self.shared
        shared.given[self.tensor_rank] = tensor
        shared.turn.release()
        shared.here.wait()
        shared.turn.acquire()
        total = torch.stack([shared.given[rank].clone() for rank in range(self.tensor)]).sum(0)
        shared.turn.release()
        shared.here.wait()  # everybody has read
        shared.turn.acquire()
        tensor.copy_(total)
        self.additions += 1


def together(models, call):
    """[what call(model) returned in each thread]. models: MODELs with part 0, 1 and so on of the same weights."""
    from flux2_pack.flux2.parallel.forward import sharded_forward

    shared, found, errors = InTurn(len(models)), [None] * len(models), []

    def one(rank):
        mesh = OneOf(tensor=len(models), tensor_rank=rank, everybody=object()).join(shared)
        network = models[rank].model.diffusion_model
        with shared.turn:
            try:
                with sharded_forward(network, mesh):
                    found[rank] = call(models[rank]), mesh
            except BaseException as error:
                errors.append(error)
                shared.here.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return found


def parts_of(make, size):
    """MODELs with the parts of the model that make() loads, once for each."""
    from flux2_pack.flux2.parallel import tensor_parallel
    from flux2_pack.flux2.parallel.workers import replica

    made = []
    for rank in range(size):
        model = make()
        originals = dict(model.model.named_parameters())
        tensor_parallel.TensorParallel(model.model.diffusion_model, rank, size)
        for key, weight in originals.items():
            replica.place(model, key, weight, torch.device("cpu"))
        made.append(model)
    return made
