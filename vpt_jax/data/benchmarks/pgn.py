"""The 12 sets of PGN (arXiv 2210.06466), which are also those of VP's CLIP experiments (arXiv 2203.17274).

CoOp's splits where there are such, train and val together for final runs and test for evaluation. The published code
selects by the test split; here val is CoOp's or, for sets without one, the last tenth of train, and final runs train on
it as the published ones do. RESISC45's split by the authors is not public: the 60/20/20 % of VTAB's code are used,
which have its sizes.
"""

from vpt_jax.data.benchmarks import labels
from vpt_jax.data.benchmarks.task import Cut, Files, Task, Tfds

_MOST, _TENTH, _TRAIN, _TEST = Cut('train', until=90), Cut('train', 90), Cut('train'), Cut('test')
_HELD_OUT = {'train': _MOST, 'val': _TENTH, 'test': _TEST}
_THIRDS = {'train': Cut('train', until=60), 'val': Cut('train', 60, until=80), 'test': Cut('train', 80)}
_ALL = 'PGN-12'


def _coop(folder: str, name: str, images: str) -> Files:
    return Files((folder,), coop=(f'split_zhou_{name}.json', images))


TASKS = (
    Task('cifar10', _ALL, 10, Tfds('cifar10', '3.0.2', **_HELD_OUT), None, '162 MiB', 'none stated',
         'https://www.cs.toronto.edu/~kriz/cifar.html'),
    Task('cifar100', _ALL, 100, Tfds('cifar100', '3.0.2', **_HELD_OUT), None, '161 MiB', 'none stated',
         'https://www.cs.toronto.edu/~kriz/cifar.html'),
    Task('svhn', _ALL, 10, Tfds('svhn_cropped', '3.0.0', **_HELD_OUT), None, '1.5 GiB', 'not for commercial use',
         'http://ufldl.stanford.edu/housenumbers/'),
    Task('dtd', _ALL, 47, None, _coop('dtd', 'DescribableTextures', 'images'), '596 MiB', 'for research',
         'https://www.robots.ox.ac.uk/~vgg/data/dtd/'),
    Task('eurosat', _ALL, 10, None, _coop('eurosat', 'EuroSAT', '2750'), '90 MiB', 'MIT',
         'https://github.com/phelber/EuroSAT'),
    Task('flowers102', _ALL, 102, None, _coop('oxford_flowers', 'OxfordFlowers', 'jpg'), '329 MiB', 'none stated',
         'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/'),
    Task('food101', _ALL, 101, None, _coop('food-101', 'Food101', 'images'), '4.7 GiB', 'none stated',
         'https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/'),
    Task('pets', _ALL, 37, None, _coop('oxford_pets', 'OxfordPets', 'images'), '774 MiB', 'CC BY-SA 4.0',
         'https://www.robots.ox.ac.uk/~vgg/data/pets/'),
    Task('sun397', _ALL, 397, None, _coop('sun397', 'SUN397', 'SUN397'), '36.4 GiB', 'for research',
         'https://vision.princeton.edu/projects/2010/SUN/'),
    Task('ucf101', _ALL, 101, None, _coop('ucf101', 'UCF101', 'UCF-101-midframes'), '0.5 GiB', 'none stated',
         'https://www.crcv.ucf.edu/data/UCF101.php', (), 'one middle frame of each video, as CoOp packed them'),
    Task('resisc45', _ALL, 45, Tfds('resisc45', '3.0.0', **_THIRDS), None, 'about 0.4 GiB', 'none stated',
         'https://doi.org/10.1109/JPROC.2017.2675998'),
    Task('clevr_count', _ALL, 8,
         Tfds('clevr', '3.1.0', _MOST, _TENTH, Cut('validation'), label=labels.of_clevr_count), None, '17.7 GiB',
         'CC BY 4.0', 'https://cs.stanford.edu/people/jcjohns/clevr/'),
)  # fmt: skip
