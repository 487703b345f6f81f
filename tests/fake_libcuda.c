// A CUDA driver without a GPU, for tests/test_cuda_runtime.py: it accepts machine code and runs none of it.
//
// FAKE_SMS      compute capabilities of its devices, such as "90,75"
// FAKE_REFUSALS how many times cuLibraryLoadData fails at first
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int sm_of(int device) {
  const char* text = getenv("FAKE_SMS");
  for (; text && *text && device > 0; --device) {
    text = strchr(text, ',');
    if (text) ++text;
  }
  return text ? atoi(text) : 0;
}

int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 200 ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 200 ? "device kernel image is invalid" : "unknown error";
  return 0;
}
int cuDeviceGetCount(int* count) {
  for (*count = 0; sm_of(*count); ++*count) continue;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? sm_of(device) / 10 : attribute == 76 ? sm_of(device) % 10 : 132;
  return 0;
}
int cuLibraryLoadData(void** library, const void* code, int* a, void** b, unsigned c, int* d, void** e, unsigned f) {
  static atomic_int calls;
  const char* refusals = getenv("FAKE_REFUSALS");
  if (atomic_fetch_add(&calls, 1) < (refusals ? atoi(refusals) : 0) || memcmp(code, "\177ELF", 4)) return 200;
  fprintf(stderr, "fake: loaded\n");
  *library = (void*)code;
  return 0;
}
int cuLibraryUnload(void* library) { return !library; }
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return strncmp(name, "jax_flash_", 10) != 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  fprintf(stderr, "fake: attribute %d = %d\n", attribute, value);
  return !kernel || device < 0;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return 0;
}

// NVRTC looks for a cache of its own behind this.
int cuGetExportTable(const void** table, const void* id) {
  *table = NULL;
  return 500;
}

int cuLaunchKernelEx() { return 0; }
int cuMemsetD8Async() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
