"""The inference engine: a fused model lowered to a flat plan over planned buffers.

- `graph`: what the model does, traced from it.
- `plan`: steps, slices, buffers; concats, pools, upsamples and sums are gone from it.
"""
