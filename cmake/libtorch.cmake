# Imported target for the torch package of the Python that CMake finds (an active venv first):
#   torch::cpu    libtorch_cpu + libc10; needs no CUDA header, library or compiler
# We link torch_cpu and never torch or torch_cuda: one binary serves machines with and without a
# GPU. libtorch_cuda is loaded at run time (sarissa/ops/device.cpp).
include_guard(GLOBAL)

if(NOT TORCH_ROOT)
  set(Python3_FIND_VIRTUALENV FIRST)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE _root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _rc)
  if(_rc)
    message(FATAL_ERROR "No torch package in ${Python3_EXECUTABLE}: run ./run build, which sets "
                        "one up in .venv, or give -DTORCH_ROOT=<site-packages>/torch.")
  endif()
  set(TORCH_ROOT "${_root}" CACHE PATH "Folder of the torch Python package")
  # Also when CMake runs again with another PATH.
  set(Python3_EXECUTABLE "${Python3_EXECUTABLE}" CACHE FILEPATH "The Python that has torch")
endif()
file(STRINGS "${TORCH_ROOT}/version.py" _v REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" TORCH_VERSION "${_v}")
if(NOT TORCH_VERSION VERSION_EQUAL 2.11.0)
  message(FATAL_ERROR "torch ${TORCH_VERSION} in ${TORCH_ROOT}; this project is built against "
                      "2.11.0: pip install --no-deps torch==2.11.0")
endif()
message(STATUS "libtorch ${TORCH_VERSION}: ${TORCH_ROOT}")

foreach(_l c10 torch_cpu)
  add_library(torch::lib_${_l} SHARED IMPORTED)
  set_target_properties(torch::lib_${_l} PROPERTIES
    IMPORTED_LOCATION "${TORCH_ROOT}/lib/lib${_l}.so")
endforeach()

add_library(torch::cpu INTERFACE IMPORTED)
target_include_directories(torch::cpu SYSTEM INTERFACE
  "${TORCH_ROOT}/include" "${TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_definitions(torch::cpu INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)
target_compile_features(torch::cpu INTERFACE cxx_std_20)
# at::parallel_for is a header template that runs serially unless OpenMP is on; its runtime must be
# the one libtorch_cpu loads.
target_compile_options(torch::cpu INTERFACE -fopenmp)
target_link_libraries(torch::cpu INTERFACE
  torch::lib_torch_cpu torch::lib_c10 "${TORCH_ROOT}/lib/libgomp.so.1")
