/* A CUDA driver that does nothing, for measuring what a call costs its host: see host_python.py.

   Modules are read far enough to know their kernels' parameters, memory is not touched, and every
   launch is counted; with `standin_record` on, it is written down too. As libcuda.so.1 and as
   libcudart.so. */

#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_PARAMETERS 64
#define INVALID_VALUE 1

typedef struct {
  char name[256];
  int parameters;
  uint32_t offset[MOST_PARAMETERS], size[MOST_PARAMETERS];
} Function;

/* As in cuda.h. */
typedef struct {
  int number;
  char padding[4];
  unsigned value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  const Attribute *attributes;
  unsigned attribute_count;
} Config;

static long launches, encoded;
static FILE *record_file;

EXPORT long standin_launches(void) { return launches; }
EXPORT long standin_encoded(void) { return encoded; }
EXPORT void standin_record(const char *path) {
  if (record_file) fclose(record_file);
  record_file = path && *path ? fopen(path, "w") : NULL;
}

static void note(Function *f, const unsigned *grid, const unsigned *block, unsigned shared,
                 void *stream, const Attribute *attributes, unsigned count, void **parameters) {
  __sync_fetch_and_add(&launches, 1);
  if (!record_file) return;
  fprintf(record_file, "%s %u %u %u %u %u %u %u %p", f->name, grid[0], grid[1], grid[2],
          block[0], block[1], block[2], shared, stream);
  for (unsigned i = 0; i < count; i++) { /* as much of the value as those in use here have */
    const Attribute *x = attributes + i;
    fprintf(record_file, " %d:%u", x->number, x->value[0]);
    if (x->number == 4) fprintf(record_file, ",%u,%u", x->value[1], x->value[2]);
  }
  for (int i = 0; i < f->parameters; i++) {
    fputc(' ', record_file);
    for (uint32_t j = 0; j < f->size[i]; j++)
      fprintf(record_file, "%02x", ((unsigned char *)parameters[i])[j]);
  }
  fputc('\n', record_file);
  fflush(record_file);
}

EXPORT int cuLaunchKernelEx(const Config *c, Function *f, void **parameters, void **extra) {
  note(f, c->grid, c->block, c->shared, c->stream, c->attributes, c->attribute_count,
       parameters);
  return 0;
}

EXPORT int cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream,
                          void **parameters, void **extra) {
  unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  note(f, grid, block, shared, stream, NULL, 0, parameters);
  return 0;
}

EXPORT int cuLaunchCooperativeKernel(Function *f, unsigned gx, unsigned gy, unsigned gz,
                                     unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                     void *stream, void **parameters) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, NULL);
}

EXPORT int cuFuncGetParamInfo(Function *f, size_t i, size_t *offset, size_t *size) {
  if (i >= (size_t)f->parameters) return INVALID_VALUE;
  *offset = f->offset[i];
  *size = f->size[i];
  return 0;
}

/* The parameters of a kernel, as `.nv.info.NAME` of its module's ELF lists them. */
static void read_parameters(Function *f, const unsigned char *image) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  if (memcmp(image, ELFMAG, SELFMAG) != 0) return;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = (const char *)image + sections[head->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", f->name);
  for (int s = 0; s < head->e_shnum; s++) {
    if (strcmp(names + sections[s].sh_name, wanted) != 0) continue;
    const unsigned char *p = image + sections[s].sh_offset, *end = p + sections[s].sh_size;
    while (p + 4 <= end) {
      uint16_t value;
      memcpy(&value, p + 2, 2);
      if (p[0] == 4 && p[1] == 0x17 && value >= 12) { /* EIATTR_KPARAM_INFO */
        uint16_t ordinal, offset;
        uint32_t flags;
        memcpy(&ordinal, p + 8, 2);
        memcpy(&offset, p + 10, 2);
        memcpy(&flags, p + 12, 4);
        if (ordinal < MOST_PARAMETERS) {
          f->offset[ordinal] = offset;
          f->size[ordinal] = flags >> 18;
          if (ordinal >= f->parameters) f->parameters = ordinal + 1;
        }
      }
      p += 4 + (p[0] == 4 ? value : 0);
    }
  }
}

EXPORT int cuModuleLoadData(const void **module, const void *image) {
  *module = image; /* who loads it may free it: kernels are asked for at once */
  return 0;
}
EXPORT int cuModuleLoadDataEx(const void **module, const void *image, unsigned n, void *o, void *v) {
  return cuModuleLoadData(module, image);
}
EXPORT int cuModuleGetFunction(Function **f, const void *module, const char *name) {
  *f = calloc(1, sizeof **f);
  snprintf((*f)->name, sizeof (*f)->name, "%s", name);
  read_parameters(*f, module);
  return 0;
}
EXPORT int cuModuleGetGlobal_v2(uint64_t *p, size_t *n, void *m, const char *name) {
  *p = 4096;
  *n = 0;
  return 0;
}

EXPORT int cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *address,
                                  const uint64_t *dims, const uint64_t *strides,
                                  const unsigned *box, const unsigned *steps, int interleave,
                                  int swizzle, int l2, int fill) {
  memset(map, 0, 128);
  map[0] = (uint64_t)address;
  map[1] = rank;
  for (unsigned i = 0; i < rank; i++) map[2 + i] = dims[i];
  encoded++;
  return 0;
}

static int value_of(int attribute) {
  switch (attribute) {
    case 1: return 1024;   /* threads per block */
    case 10: return 32;    /* warp size */
    case 16: return 132;   /* multiprocessors */
    case 75: return 9;     /* compute capability */
    case 76: return 0;
    case 97: return 232448; /* shared memory that a block may opt in to */
    default: return 65536;
  }
}

EXPORT int cuDeviceGetAttribute(int *v, int attribute, int device) { *v = value_of(attribute); return 0; }
EXPORT int cudaDeviceGetAttribute(int *v, int attribute, int device) { *v = value_of(attribute); return 0; }
EXPORT int cuFuncGetAttribute(int *v, int attribute, void *f) { *v = attribute ? 0 : 1024; return 0; }
EXPORT int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
EXPORT int cuGetErrorName(int e, const char **s) { *s = "none"; return 0; }
EXPORT const char *cudaGetErrorString(int e) { return "none"; }
EXPORT int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "stand-in"); return 0; }
EXPORT int cuDeviceGet(int *d, int n) { *d = 0; return 0; }
EXPORT int cuDeviceGetCount(int *n) { *n = 1; return 0; }
EXPORT int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
EXPORT int cuCtxGetDevice(int *d) { *d = 0; return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
EXPORT int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
EXPORT int cuStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
EXPORT int cudaGetDevice(int *d) { *d = 0; return 0; }
EXPORT int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
EXPORT int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = (size_t)1 << 37; return 0; }

#define NOTHING(name) EXPORT int name() { return 0; }
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit)
NOTHING(cuCtxResetPersistingL2Cache) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleGetGlobal) NOTHING(cuModuleUnload) NOTHING(cuMemsetD32) NOTHING(cuMemsetD32_v2) NOTHING(cuStreamSetAttribute)
NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttribute) NOTHING(cuPointerGetAttributes)
NOTHING(cudaEventCreate) NOTHING(cudaEventDestroy) NOTHING(cudaEventElapsedTime)
NOTHING(cudaEventRecord) NOTHING(cudaEventSynchronize) NOTHING(cudaFree) NOTHING(cudaFreeHost)
NOTHING(cudaGetDeviceProperties) NOTHING(cudaGetDeviceProperties_v2) NOTHING(cudaGetLastError)
NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy) NOTHING(cudaGraphInstantiate)
NOTHING(cudaGraphInstantiateWithFlags) NOTHING(cudaGraphLaunch) NOTHING(cudaMalloc)
NOTHING(cudaMallocHost) NOTHING(cudaMemcpyAsync) NOTHING(cudaMemcpyPeerAsync)
NOTHING(cudaMemsetAsync) NOTHING(cudaPeekAtLastError) NOTHING(cudaSetDevice)
NOTHING(cudaStreamBeginCapture) NOTHING(cudaStreamCreate) NOTHING(cudaStreamCreateWithFlags)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamEndCapture) NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent) NOTHING(cudaMemset) NOTHING(cudaMemcpy)
NOTHING(cudaDeviceSynchronize) NOTHING(cudaFuncSetAttribute) NOTHING(cudaIpcGetMemHandle)
NOTHING(cudaIpcOpenMemHandle) NOTHING(cudaIpcCloseMemHandle)

/* How torch hands its tensors to TileLang's programs, but that those of the host are a GPU's. As in
   dlpack.h. */
typedef struct {
  uint64_t version;
  void *context, *deleter;
  uint64_t flags;
  void *data;
  int32_t device_type, device_id;
} Managed;
typedef struct {
  uint32_t major, minor;
  void *older, *allocate;
  int (*managed_from)(void *, Managed **);
  void *managed_to, *dense_from;
  int (*stream)(int, int, void **);
} Exchange;

static Exchange exchange;
static int (*managed_from)(void *, Managed **);

static int managed_on_gpu(void *object, Managed **found) {
  int result = managed_from(object, found);
  if (result == 0) {
    (*found)->device_type = 2;
    (*found)->device_id = 0;
  }
  return result;
}
static int no_stream(int type, int device, void **stream) {
  *stream = NULL;
  return 0;
}
EXPORT void *standin_exchange(const Exchange *torchs) {
  exchange = *torchs;
  managed_from = torchs->managed_from;
  exchange.managed_from = managed_on_gpu;
  exchange.stream = no_stream;
  return &exchange;
}
