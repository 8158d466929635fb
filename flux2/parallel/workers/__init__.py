"""Processes and replicas: the ComfyUI process is rank 0, every other rank is a worker process with its own copy of the
model.

  install.py   the MODEL of rank 0: which call is shared with the workers; start, end and cancel of a sampling
  session.py   the ranks of one loaded model: replicas, mesh, forward passes
  pool.py      their processes: started, greeted, asked, watched, ended; launch.py starts one
  worker.py    the file that a worker process is started from, here or under torchrun on another host
  replica.py   a worker's copy of the model, loaded from the same file and brought to the state of rank 0's weight
               patches
  patch_transfer.py what of a MODEL's options reaches the workers, and what is refused by name: one row each
  step.py      one forward pass on every rank: inputs, and the split plan (flux2/parallel) while it runs
  process_groups.py process groups of our own, beside torch.distributed's default group
  channel.py   messages: JSON and raw tensor bytes over an authenticated socket, never pickle; serialize.py says what
               can be sent
  devices.py   which GPUs there are; versions.py what a rank is; report.py what the ranks did
"""
