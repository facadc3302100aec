"""Triton kernels for flux-engine, one file per op: kernel, checked wrapper, torch `reference`.

There are none yet: `flux_engine.ops` holds the torch definition of every op, which a kernel has to agree with. This
package imports torch and triton only, never flux_engine.
"""
