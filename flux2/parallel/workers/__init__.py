"""Processes and replicas: the ComfyUI process is rank 0, every other rank is a worker process with its own copy of the
model.

  install.py         the MODEL of rank 0: which call is shared with the workers; start, end and cancel of a sampling
  session.py         the ranks of one loaded model: replicas, mesh, forward passes; session_state.py: its state
  pool.py            their processes: started, proven, asked, watched, ended; launch.py starts one, ahead.py starts
                     them before a prompt needs them
  worker.py          the file that a worker process is started from, here or under torchrun on another host
  replica.py         a worker's copy of the model, loaded from the same file and brought to the state of rank 0's
                     weight patches; LOADERS says what a worker may be told to load;
                     gguf.py: models of the pack ComfyUI-GGUF, by the pack that the worker finds itself
  split_model.py     the MODEL of rank 0 where weights are split over the ranks: its part of them
  patch_transfer.py  what of a MODEL's options reaches the workers, and what is refused by name: one rule each
  step.py            one forward pass on every rank: its inputs, and the network that is sharded while it runs
  kernel_choice.py   the kernel that `auto` takes on rank 0, for every rank
  process_groups.py  process groups of our own, beside torch.distributed's default group; rendezvous.py: how ranks find
                     one another
  channel.py         messages: JSON and raw tensor bytes over an authenticated socket, never pickle; serialize.py and
                     dtypes.py: what can be sent; answers.py: what workers may say
  devices.py         which GPUs there are; versions.py what a rank is; report.py what the ranks did

Threads of rank 0: ComfyUI's own computes; a supervisor for each pool starts and watches its processes; a reader for
each worker receives. Of a worker: the main thread computes, one receives, one says that the process runs.
"""
