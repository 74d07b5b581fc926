// Version of the operators and of the layout of weights. Must equal that in
// runtime/engines/kernels/__init__.py.
#pragma once

#define FREEEXPORT_KERNELS_VERSION 12
