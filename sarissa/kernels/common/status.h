// What a kernel launch reports. Kernels throw nothing and print nothing: ops/ turns a status into
// an error that names the operator.
#pragma once

namespace sarissa::kernels {

struct Status {
  const char* error = nullptr;   // null: all went well; else a static string
  const char* kernel = nullptr;  // the variant that ran, a static string, where there are several
  bool ok() const { return error == nullptr; }
};

}  // namespace sarissa::kernels
