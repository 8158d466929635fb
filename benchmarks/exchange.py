"""What one attention call over several GPUs consists of: exchange, attention, merge, apart and together. The parts that
parallel_model.py wants.

  torchrun --standalone --nproc-per-node 4 benchmarks/exchange.py [--seq 4608 16896] [--heads 48] [--backend sdpa-cudnn]
  [--json FILE]

Per length and arrangement (Ulysses x ring): milliseconds of the whole call, with heads in one group or several (so that
one travels while another is computed); of everything but attention (packing, exchange, unpacking); of the bare
collective, with its payload in GB/s per GPU; of the attention that one GPU computes; of one rotation and one merge of a
ring; and how much of the exchange a matrix product of a single block's feed-forward part covers (begin, product,
compute, product, finish against the same one after the other). Error: this rank's rows of two heads against float32.
Medians over repetitions, the slowest rank counts. NCCL on GPUs, gloo on the CPU (--device cpu: to try it out). Not
covered: whole steps (benchmarks/parallel.py).
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

from common import import_pack, write

import_pack()
from flux2_pack.attention import reference, registry  # noqa: E402
from flux2_pack.attention.device import describe  # noqa: E402
from flux2_pack.attention.parallel import make_mesh, ring, usp  # noqa: E402
from flux2_pack.attention.parallel.lse_merge import merge  # noqa: E402
from flux2_pack.attention.parallel.mesh import pairs  # noqa: E402

HEAD_DIM, CHECKED = 128, 2
FEED_FORWARD = 36864  # columns of the feed-forward part of a FLUX.2-dev single block's first product


class Bench:
    """One rank's tensors and clocks. lengths: tokens of each rank."""

    def __init__(self, options, device, rank, size):
        self.options, self.device, self.rank, self.size = options, device, rank, size
        self.dtype = torch.bfloat16
        self.adapter = registry.adapter(options.backend, describe(device))

    def whole(self, seq):
        """q, k, v (1, S, H, D), the same on every rank."""
        generator = torch.Generator(self.device).manual_seed(seq)
        return [
            torch.randn(1, seq, self.options.heads, HEAD_DIM, generator=generator, device=self.device, dtype=self.dtype)
            for _ in range(3)
        ]

    def local(self, q, k, v, *, mask, scale, need_lse):
        return self.adapter.attend(q, k, v, mask=mask, scale=scale, need_lse=need_lse)

    def ms(self, work, together=True):
        """Median milliseconds; of the slowest rank when all of them work together."""
        for _ in range(3):
            work()
        found = []
        for _ in range(self.options.repeat):
            if together:
                dist.barrier()
            found.append(self._once(work))
        slowest = torch.tensor(statistics.median(found), device=self.device)
        if together:
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return round(slowest.item(), 4)

    def _once(self, work):
        if self.device.type != "cuda":
            begun = time.perf_counter()
            work()
            return (time.perf_counter() - begun) * 1e3
        torch.cuda.synchronize()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended)


def untouched(q, k, v, *, mask, scale, need_lse):
    """In the place of attention: nothing is computed."""
    return q, q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def bare(bench, mesh, lengths):
    """{"collective_ms", "collective_gbs"} of q, k and v to their ranks, without packing."""
    mine, width = lengths[bench.rank], 3 * bench.options.heads // mesh.ulysses * HEAD_DIM
    near = [lengths[r] for r in mesh.ulysses_group_ranks()]
    sent, received = (
        torch.empty(n * width, device=bench.device, dtype=bench.dtype) for n in (mine * mesh.ulysses, sum(near))
    )
    sizes = [n * width for n in near], [mine * width] * mesh.ulysses
    ms = bench.ms(lambda: dist.all_to_all_single(received, sent, *sizes, group=mesh.ulysses_group))
    return {"collective_ms": ms, "collective_gbs": round((mesh.ulysses - 1) * mine * width * 2 / ms / 1e6, 1)}


def rotation(bench, mesh, q, k, lengths):
    """{"rotation_ms", "rotation_gbs", "merge_ms"} of a ring's keys and values."""
    group = [sum(lengths[r] for r in mesh.ulysses_group_ranks(n)) for n in range(mesh.ring)]
    here, there = ring.buffers(k, group, 1, bench.options.heads // mesh.ulysses)
    own, coming = group[mesh.ring_rank], group[mesh.ring_rank - 1]
    ms = bench.ms(lambda: mesh.rotate(here[:own].view(-1), there[:coming].view(-1))())
    out = torch.randn(1, own, here.shape[3], HEAD_DIM, device=bench.device)
    part, lse = out.to(bench.dtype), torch.randn(1, here.shape[3], own, device=bench.device)
    merging = bench.ms(lambda: merge(out, lse, part, lse), False)
    return {"rotation_ms": ms, "rotation_gbs": round(here[:own].numel() * 2 / ms / 1e6, 1), "merge_ms": merging}


def covered(bench, mesh, own, lengths):
    """{"product_ms", "in_turn_ms", "covered_ms"}: the exchange beside a matrix product of the feed-forward part in two
    halves.
    """
    x = torch.randn(lengths[bench.rank], bench.options.heads * HEAD_DIM, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(bench.options.feed_forward // 2, x.shape[1], device=bench.device, dtype=bench.dtype)

    def product():
        return x @ weight.T

    def in_turn():
        product(), product()
        usp.attend(bench.local, *own, mesh, lengths)

    def at_once():
        call = usp.begin(bench.local, *own, mesh, lengths)
        product()
        call.compute()
        product()
        call.finish()

    return {
        "product_ms": bench.ms(lambda: (product(), product()), False),
        "in_turn_ms": bench.ms(in_turn),
        "covered_ms": bench.ms(at_once),
    }


def case(bench, mesh, seq):
    """One length on one arrangement."""
    lengths = tuple(seq * (rank + 1) // bench.size - seq * rank // bench.size for rank in range(bench.size))
    q, k, v = bench.whole(seq)
    own = [t.split(lengths, dim=1)[bench.rank] for t in (q, k, v)]
    heads = bench.options.heads // mesh.ulysses
    part, keys = (
        q[:, : sum(lengths[r] for r in mesh.ulysses_group_ranks()), :heads],
        [t[:, : seq // mesh.ring, :heads] for t in (k, v)],
    )

    def attention():
        for _ in range(mesh.ring):
            bench.local(part, *keys, mask=None, scale=None, need_lse=mesh.ring > 1)

    found = {
        "seq": seq,
        "ulysses": mesh.ulysses,
        "ring": mesh.ring,
        "backend": bench.options.backend,
        "exchange_ms": bench.ms(lambda: usp.attend(untouched, *own, mesh, lengths)),
        "attention_ms": bench.ms(attention, False),
    }
    for groups in bench.options.overlap_chunks if mesh.ring == 1 else [1]:
        if heads % groups == 0:
            mesh.overlap_chunks = groups
            found[f"ms_{groups}_groups"] = bench.ms(lambda: usp.attend(bench.local, *own, mesh, lengths))
    mesh.overlap_chunks = 1
    exact = reference.attend(*(t[:, :, :CHECKED] for t in (own[0], k, v)))[0]
    found["rel_error"] = reference.relative_error(usp.attend(bench.local, *own, mesh, lengths)[:, :, :CHECKED], exact)
    found |= bare(bench, mesh, lengths) if mesh.ulysses > 1 else {}
    found |= rotation(bench, mesh, q, k, lengths) if mesh.ring > 1 else {}
    return found | (covered(bench, mesh, own, lengths) if mesh.ring == 1 else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[4608, 16896], help="tokens of all GPUs together")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--backend", default="sdpa-cudnn", help="attention kernel on each GPU")
    parser.add_argument("--overlap-chunks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--feed-forward",
        type=int,
        default=FEED_FORWARD,
        help="columns of the product that the exchange is to hide behind",
    )
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if options.device == "cpu" else "nccl", device_id=None if options.device == "cpu" else device
    )
    rank, size, rows = dist.get_rank(), dist.get_world_size(), []
    with torch.inference_mode():
        for degrees in pairs(size, options.heads):
            mesh = make_mesh(degrees.ulysses, degrees.ring, device)
            for seq in options.seq:
                rows.append(case(Bench(options, device, rank, size), mesh, seq))
                if rank == 0:
                    print(rows[-1], flush=True)
    if rank == 0:
        write({"gpus": size, "cases": rows}, options.json)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
