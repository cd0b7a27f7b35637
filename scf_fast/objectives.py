"""The objectives of stage 2: the systems of the published table.

|                                             | von Mises-Fisher (``-v``)  | Gaussian (``-G``)     |
|---------------------------------------------|----------------------------|-----------------------|
| density against the own class center        | ``scf``, SCF               | ``scf_gaussian``      |
| density against the other images of a person | ``pfe_vmf``, PFE-v         | ``pfe``, PFE-G        |

Sources: Li et al., CVPR 2021 (SCF); Shi and Jain, ICCV 2019 (PFE).
"""

import enum


class Density(enum.Enum):
    """A family of densities around the direction mu; the value is the name in files and options."""

    VMF = "vmf"  # concentration kappa on the sphere
    GAUSSIAN = "gaussian"  # variance sigma^2, one for all dimensions or one for each

    @property
    def confidence_name(self) -> str:
        """Name of an image's confidence in files: kappa, or precision, which is 1 / variance."""
        return "kappa" if self is Density.VMF else "precision"


class Objective(enum.Enum):
    """What a confidence net is trained for; the value is the name in files and options."""

    SCF = "scf"
    SCF_GAUSSIAN = "scf_gaussian"
    PFE = "pfe"
    PFE_VMF = "pfe_vmf"

    @property
    def density(self) -> Density:
        """The density whose parameter the net predicts."""
        return Density.VMF if self in (Objective.SCF, Objective.PFE_VMF) else Density.GAUSSIAN

    @property
    def is_pairwise(self) -> bool:
        """True where images are held against other images of the person, not against the class center."""
        return self in (Objective.PFE, Objective.PFE_VMF)

    @property
    def title(self) -> str:
        """Name in the paper's table."""
        return _TITLES[self]


_TITLES = {
    Objective.SCF: "SCF",
    Objective.SCF_GAUSSIAN: "SCF-G",
    Objective.PFE: "PFE-G",
    Objective.PFE_VMF: "PFE-v",
}
