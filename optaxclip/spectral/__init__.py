"""grads -> singular values -> grads: clipping matrices by their spectra.

A file per idea:

    leaf --matrices--> X, c --spectrum--> U diag(f(sigma)) V^T --> leaf
                              newton_schulz | svd | power_iteration

It is outside the algebra of measure, threshold and scale, in which a group has one factor: here
each singular value has one of its own. Its state is a `ClipState`, so that `optaxclip.metrics` and
`optaxclip.validate_state` know it. It may stand before an optimizer, on gradients, or behind it, on
updates, `optax.contrib.muon` and its `scale_by_muon` included.
"""

from .clip import clip_by_spectral_norm as clip_by_spectral_norm
