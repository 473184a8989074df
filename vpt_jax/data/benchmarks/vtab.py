"""VTAB-1k's 19 tasks as VPT cuts them (arXiv 1910.04867, 2203.12119; KMnP/vpt, `VTAB_SETUP.md`).

train is train800, val is val200, test the whole test set; final runs train on train800val200. All are slices of TFDS
splits in stored order. Each task is also read from the folder form in which VTAB-1k circulates (`vpt_jax.data.lists`),
under the folder's usual name.
"""

from vpt_jax.data.benchmarks import labels
from vpt_jax.data.benchmarks.task import Cut, Files, Task, Tfds
from vpt_jax.data.tfds_files import to_255

_TRAIN = Cut('train', 0, 800)
_VALIDATION = Cut('validation', 0, 200)
_TEST = Cut('test')
_CLEVR = {'train': _TRAIN, 'val': Cut('train', 90, 200), 'test': Cut('validation')}
_DSPRITES = {'train': _TRAIN, 'val': Cut('train', 80, 200), 'test': Cut('train', 90), 'image': to_255}
_NORB = {'train': _TRAIN, 'val': Cut('test', 0, 200), 'test': Cut('test', 50)}
_PLAIN = {'train': _TRAIN, 'val': _VALIDATION, 'test': _TEST}

_CLEVR_AT = ('17.7 GiB', 'CC BY 4.0', 'https://cs.stanford.edu/people/jcjohns/clevr/')
_DSPRITES_AT = ('27 MiB', 'Apache-2.0', 'https://github.com/google-deepmind/dsprites-dataset')
_NORB_AT = ('250 MiB', 'for research', 'https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/')
_BY_HAND = 'part of it has to be downloaded by hand'

TASKS = (
    Task('cifar100', 'Natural', 100, Tfds('cifar100', '3.0.2', _TRAIN, Cut('train', 90, 200), _TEST), Files(('cifar',)),
         '161 MiB', 'none stated', 'https://www.cs.toronto.edu/~kriz/cifar.html', ('cifar',)),
    Task('caltech101', 'Natural', 102, Tfds('caltech101', '3.0.1', _TRAIN, Cut('train', 90, 200), _TEST),
         Files(('caltech101',)), '131 MiB', 'CC BY 4.0', 'https://data.caltech.edu/records/mzrjq-6wc02'),
    Task('dtd', 'Natural', 47, Tfds('dtd', '3.0.1', **_PLAIN), Files(('dtd',)), '596 MiB', 'for research',
         'https://www.robots.ox.ac.uk/~vgg/data/dtd/'),
    Task('flowers102', 'Natural', 102, Tfds('oxford_flowers102', '2.1.1', **_PLAIN), Files(('oxford_flowers102',)),
         '329 MiB', 'none stated', 'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/', ('oxford_flowers102',)),
    Task('pets', 'Natural', 37, Tfds('oxford_iiit_pet', '3.2.0', _TRAIN, Cut('train', 80, 200), _TEST, also=(4,)),
         Files(('oxford_iiit_pet',)), '774 MiB', 'CC BY-SA 4.0', 'https://www.robots.ox.ac.uk/~vgg/data/pets/',
         ('oxford_iiit_pet',), 'version 4 has the same order and 12 images encoded again'),
    Task('svhn', 'Natural', 10, Tfds('svhn_cropped', '3.0.0', _TRAIN, Cut('train', 90, 200), _TEST), Files(('svhn',)),
         '1.5 GiB', 'not for commercial use', 'http://ufldl.stanford.edu/housenumbers/'),
    Task('sun397', 'Natural', 397, Tfds('sun397/tfds', '4.0.0', **_PLAIN), Files(('sun397',)), '36.4 GiB',
         'for research', 'https://vision.princeton.edu/projects/2010/SUN/'),
    Task('patch_camelyon', 'Specialized', 2, Tfds('patch_camelyon', '2.0.0', **_PLAIN), Files(('patch_camelyon',)),
         '7.5 GiB', 'CC0', 'https://github.com/basveeling/pcam'),
    Task('eurosat', 'Specialized', 10,
         Tfds('eurosat/rgb', '2.0.0', _TRAIN, Cut('train', 60, 200), Cut('train', 80)), Files(('eurosat',)),
         '90 MiB', 'MIT', 'https://github.com/phelber/EuroSAT'),
    Task('resisc45', 'Specialized', 45, Tfds('resisc45', '3.0.0', _TRAIN, Cut('train', 60, 200), Cut('train', 80)),
         Files(('resisc45',)), 'about 0.4 GiB', 'none stated', 'https://doi.org/10.1109/JPROC.2017.2675998', (),
         _BY_HAND),
    Task('retinopathy', 'Specialized', 5, Tfds('diabetic_retinopathy_detection/btgraham-300', '3.0.0', **_PLAIN),
         Files(('diabetic_retinopathy',)), 'about 80 GiB', 'rules of the Kaggle competition',
         'https://www.kaggle.com/c/diabetic-retinopathy-detection', ('diabetic_retinopathy',), _BY_HAND),
    Task('clevr_count', 'Structured', 8, Tfds('clevr', '3.1.0', label=labels.of_clevr_count, **_CLEVR),
         Files(('clevr_count',)), *_CLEVR_AT),
    Task('clevr_distance', 'Structured', 6, Tfds('clevr', '3.1.0', label=labels.of_clevr_distance, **_CLEVR),
         Files(('clevr_dist',)), *_CLEVR_AT, ('clevr_dist',)),
    Task('dmlab', 'Structured', 6, Tfds('dmlab', '2.0.1', **_PLAIN), Files(('dmlab',)), '2.8 GiB', 'none stated',
         'https://github.com/google-research/task_adaptation'),
    Task('kitti', 'Structured', 4, Tfds('kitti', '3.2.0', label=labels.of_kitti, **_PLAIN), Files(('kitti',)),
         '11.7 GiB', 'CC BY-NC-SA 3.0', 'http://www.cvlibs.net/datasets/kitti/'),
    Task('dsprites_location', 'Structured', 16, Tfds('dsprites', '2.0.0', label=labels.of_dsprites_x, **_DSPRITES),
         Files(('dsprites_loc',)), *_DSPRITES_AT, ('dsprites_loc',), 'the x position only'),
    Task('dsprites_orientation', 'Structured', 16,
         Tfds('dsprites', '2.0.0', label=labels.of_dsprites_orientation, **_DSPRITES), Files(('dsprites_ori',)),
         *_DSPRITES_AT, ('dsprites_ori',)),
    Task('smallnorb_azimuth', 'Structured', 18, Tfds('smallnorb', '2.0.0', label='label_azimuth', **_NORB),
         Files(('smallnorb_azi',)), *_NORB_AT, ('smallnorb_azi',), 'val is part of the official test set'),
    Task('smallnorb_elevation', 'Structured', 9, Tfds('smallnorb', '2.0.0', label='label_elevation', **_NORB),
         Files(('smallnorb_ele',)), *_NORB_AT, ('smallnorb_ele',), 'val is part of the official test set'),
)  # fmt: skip
