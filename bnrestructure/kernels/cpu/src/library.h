// What the shared library shows to the outside: C functions of pointers, int64 sizes and floats (see ../library.py).
#pragma once

#define BNR_EXPORT extern "C" __attribute__((visibility("default")))
