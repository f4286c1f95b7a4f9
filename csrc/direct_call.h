// dwconv_bn_act from Python without torch's dispatcher.
#pragma once

#include <Python.h>

namespace mnet {

// Adds `dwconv_bn_act_direct` to a module that is being imported, torch being there; false: with a
// Python error.
bool add_direct_call(PyObject* module);

}  // namespace mnet
