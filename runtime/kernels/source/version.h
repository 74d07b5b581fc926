// Of the operators and of the layout of weights. runtime/kernels/__init__.py has the same number.
#pragma once

#define FREEEXPORT_KERNELS_VERSION 7
