/* A CUDA driver without a device: it refuses what a real one refuses, and runs nothing.

Triton's launch path (its binder, its C launcher, the encoding of descriptors) calls the driver;
linked against this it works on a CPU. `stub_device` says which GPU is played; a refusal's reason is
what cuGetErrorString gives; `stub_launched` holds what was launched last. */
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define API __attribute__((visibility("default")))
#define REFUSE(...)                                                                                \
  do {                                                                                             \
    snprintf(reason, sizeof(reason), __VA_ARGS__);                                                 \
    return CUDA_ERROR_INVALID_VALUE;                                                               \
  } while (0)

typedef struct {
  int largest_shared; /* that the function was given leave for */
} Function;

typedef struct {
  unsigned grid[3], threads, shared, overlaps, descriptors;
} Launch;

API Launch stub_launched;
static int capability, shared_limit;
static unsigned descriptors;
static char reason[256];

API void stub_device(int new_capability, int new_shared_limit) {
  capability = new_capability;
  shared_limit = new_shared_limit;
  descriptors = 0;
}

API CUresult cuGetErrorString(CUresult result, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

API CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = shared_limit;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = shared_limit + 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default: /* clocks, widths: for reports */
    *value = 1;
  }
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return cuCtxGetCurrent(context);
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof(Function));
  made->largest_shared = 48 * 1024;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > shared_limit)
      REFUSE("%d bytes of shared memory, the device has %d", value, shared_limit);
    ((Function *)function)->largest_shared = value;
  }
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at) {
  *(CUdeviceptr *)value = at;
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function,
                                          const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                              void **extra) {
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ, overlaps = 0;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      overlaps = config->attrs[i].value.programmaticStreamSerializationAllowed;
  if (config->gridDimX - 1 >= 2147483647u || config->gridDimY - 1 >= 65535u ||
      config->gridDimZ - 1 >= 65535u)
    REFUSE("a grid of %u x %u x %u", config->gridDimX, config->gridDimY, config->gridDimZ);
  if (threads - 1 >= 1024)
    REFUSE("%u threads", threads);
  if ((int)config->sharedMemBytes > ((Function *)function)->largest_shared)
    REFUSE("%u bytes of shared memory without leave", config->sharedMemBytes);
  if (overlaps && capability < 90)
    REFUSE("programmatic launch on compute capability %d", capability);
  stub_launched = (Launch){{config->gridDimX, config->gridDimY, config->gridDimZ},
                           threads, config->sharedMemBytes, overlaps, descriptors};
  descriptors = 0;
  return CUDA_SUCCESS;
}

/* The rules of the driver's documentation; element strides are 1 and nothing is interleaved. */
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                    void *address, const cuuint64_t *sizes,
                                    const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
  static const unsigned widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned spans[] = {1 << 20, 32, 64, 128}; /* bytes a swizzle's inner box may have */
  if (type >= sizeof(widths) / sizeof(*widths) || swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    REFUSE("type %d, swizzle %d: not known to this stub", type, swizzle);
  unsigned width = widths[type];
  if (capability < 90)
    REFUSE("a tensor descriptor on compute capability %d", capability);
  if (rank < 1 || rank > 5)
    REFUSE("rank %u", rank);
  if ((uintptr_t)address % 16)
    REFUSE("address %p is no multiple of 16", address);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > (1ull << 32))
      REFUSE("size %llu of axis %u", (unsigned long long)sizes[i], i);
    if (box[i] < 1 || box[i] > 256)
      REFUSE("a box of %u along axis %u", box[i], i);
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    uint64_t least = i ? strides[i - 1] * sizes[i] : sizes[0] * width;
    if (strides[i] % 16 || strides[i] >= (1ull << 40) || strides[i] < least)
      REFUSE("stride %llu of axis %u", (unsigned long long)strides[i], i + 1);
  }
  if (box[0] * width % 16 || box[0] * width > spans[swizzle])
    REFUSE("%u bytes of a box's rows, swizzle %d", box[0] * width, swizzle);
  descriptors++;
  return CUDA_SUCCESS;
}
