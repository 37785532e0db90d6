# Builds matexport_cuda where there is an nvcc that works; included by CMakeLists.txt.
#
# The kernels are compiled to PTX once, and from that to machine code for each GPU: 20 seconds instead of a minute. The PTX
# is in the library too, for GPUs to come. libcudart is linked statically: without a driver the library loads all the same.
set(wanted "$ENV{MATEXPORT_CUDA}")
if(wanted STREQUAL "0")
  return()
endif()

# Why there is no matexport_cuda: an error if it was asked for.
function(no_cuda why)
  if(wanted STREQUAL "1")
    message(FATAL_ERROR "MATEXPORT_CUDA=1, but ${why}")
  endif()
  message(STATUS "Without kernels for NVIDIA GPUs: ${why}")
endfunction()

find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(NOT nvcc)
  no_cuda("there is no nvcc")
  return()
endif()
file(WRITE "${CMAKE_BINARY_DIR}/check.cu" "__global__ void f(int *p) { *p = 1; }\nvoid g() { f<<<1, 1>>>(nullptr); }\n")
set(nvcc_flags -std=c++17 -O3 -ccbin "${CMAKE_CXX_COMPILER}" -Xcompiler -fPIC,-fvisibility=hidden,-fno-exceptions)
execute_process(
  COMMAND "${nvcc}" ${nvcc_flags} -arch=sm_80 -c check.cu -o check.o
  WORKING_DIRECTORY "${CMAKE_BINARY_DIR}" RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  no_cuda("${nvcc} does not work:\n${said}")
  return()
endif()

# nvcc itself may be a script that calls another one, beside which the libraries are
execute_process(COMMAND "${nvcc}" -dryrun -c check.cu WORKING_DIRECTORY "${CMAKE_BINARY_DIR}" ERROR_VARIABLE said)
string(REGEX MATCH "TOP=([^\n]*)" top "${said}")
get_filename_component(top "${CMAKE_MATCH_1}" ABSOLUTE)
find_library(cudart_static libcudart_static.a HINTS "${top}"
  PATH_SUFFIXES lib64 lib targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib targets/sbsa-linux/lib)
if(NOT cudart_static)
  no_cuda("libcudart_static.a is not in ${top}")
  return()
endif()

execute_process(COMMAND "${nvcc}" --list-gpu-code OUTPUT_VARIABLE known)
set(code "compute_80")
foreach(architecture 80 86 87 89 90 100 120)
  if(known MATCHES "sm_${architecture}\n")
    string(APPEND code ",sm_${architecture}")
  endif()
endforeach()
set(fatbin_flags -Xfatbin -compress-all)
if(known MATCHES "sm_120\n")  # CUDA 12.8
  list(APPEND fatbin_flags --compress-mode=size)
endif()
file(GLOB cuda_headers CONFIGURE_DEPENDS "${package}/*/cuda*.h" "${package}/native/matexport_cuda.h")
add_custom_command(
  OUTPUT cuda_library.o
  COMMAND "${nvcc}" ${nvcc_flags} --threads 0 "-gencode=arch=compute_80,code=[${code}]" ${fatbin_flags}
          -c "${package}/native/cuda_library.cu" -o cuda_library.o
  DEPENDS "${package}/native/cuda_library.cu" ${cuda_headers}
  COMMENT "Compiling CUDA kernels for ${code}" VERBATIM)
op_library(matexport_cuda
  "${CMAKE_CURRENT_BINARY_DIR}/cuda_library.o" "${package}/native/cuda_ort.cc" "${package}/native/trt_plugin.cc")
target_compile_definitions(matexport_cuda PRIVATE MATEXPORT_CUDA)
# TensorRT's classes have RTTI
set_source_files_properties("${package}/native/trt_plugin.cc" PROPERTIES COMPILE_OPTIONS -frtti)
target_link_libraries(matexport_cuda PRIVATE "${cudart_static}" pthread dl rt)
