"""SANER and the SAM family for JAX, as composable Optax gradient transformations.

One wrapper strings two kinds of stages around a second gradient::

    g = grad L(w)  ->  ascent: eps(g)  ->  h = grad L(w + eps)  ->  descent: h corrected, reweighted  ->  next in chain

Every stage is an ordinary Optax transformation; every method below is one composition of them.
"""

# What pairs of gradients, and the mask, are made of.
from saner_jax import analysis as analysis

# The wrapper: the one place where the gradient is taken a second time.
# Aliases: the papers' methods, each one visible composition.
from saner_jax._alias import asam as asam
from saner_jax._alias import fsam as fsam
from saner_jax._alias import gsam as gsam
from saner_jax._alias import sam as sam
from saner_jax._alias import saner as saner
from saner_jax._alias import sgd_d as sgd_d
from saner_jax._alias import vasso as vasso

# Ascent: gradient -> perturbation.
from saner_jax._ascent import FollowEmaState as FollowEmaState
from saner_jax._ascent import ScaleToAdaptiveNormState as ScaleToAdaptiveNormState
from saner_jax._ascent import ScaleToNormState as ScaleToNormState
from saner_jax._ascent import SubtractEmaState as SubtractEmaState
from saner_jax._ascent import follow_ema as follow_ema
from saner_jax._ascent import scale_to_adaptive_norm as scale_to_adaptive_norm
from saner_jax._ascent import scale_to_norm as scale_to_norm
from saner_jax._ascent import subtract_ema as subtract_ema

# Descent: perturbed gradient -> update.
from saner_jax._descent import DownweightRandomState as DownweightRandomState
from saner_jax._descent import DownweightState as DownweightState
from saner_jax._descent import SubtractOrthogonalState as SubtractOrthogonalState
from saner_jax._descent import downweight as downweight
from saner_jax._descent import downweight_random as downweight_random
from saner_jax._descent import restore_downweighted as restore_downweighted
from saner_jax._descent import subtract_orthogonal as subtract_orthogonal

# Groups of elements, by their ratio of the two gradients.
from saner_jax._masks import is_downweighted as is_downweighted
from saner_jax._masks import is_grown as is_grown
from saner_jax._masks import is_turned as is_turned

# Schedules of the papers.
from saner_jax._schedules import alpha_ramp as alpha_ramp
from saner_jax._schedules import rho_from_learning_rate as rho_from_learning_rate
from saner_jax._sharpness_aware import Monitored as Monitored
from saner_jax._sharpness_aware import SharpnessAwareState as SharpnessAwareState
from saner_jax._sharpness_aware import sharpness_aware as sharpness_aware

__version__ = "0.1.0"
