"""The engine graph: a fused model lowered to a flat plan over planned buffers, and run.

- `trace`: what the model does, traced from it.
- `steps`: what a plan is made of. `passes`: how operations become steps; concats, pools, upsamples
  and sums are gone after them. `plan`: the whole, with its launches, traffic and expected time.
- `planned`: the plan made ready to run. `calibrate`: ranges of its maps, for fp8 and int8.
- `captured`: from uint8 frames to boxes, on CUDA as one captured graph.
- `network`: keeps plans and captured ways, and falls back where one fails. `guard`: how far a plan
  is from the eager model.
- `workload`: what a model launches, for the tuner and the ahead-of-time compiler.
"""
