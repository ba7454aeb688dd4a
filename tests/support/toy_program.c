/* A TileLang program as its host code is compiled, on two tensors and a scalar: the kernel is given
   a map of the second, the first's address, and the scalar. With TWISTED the map's first word is no
   address; with UNEVEN every other call launches twice. */

#include <stdint.h>
#include <string.h>

typedef struct {
  int32_t kind, padding;
  union {
    int64_t number;
    double real;
    void *pointer;
  };
} Any;
typedef struct {
  void *data;
} Dense;

enum { INT = 1, FLOAT = 3, POINTER = 4 };

extern int TVMBackendGetFuncFromEnv(void *context, const char *name, void **found);
extern int TVMFFIFunctionCall(void *function, Any *given, int32_t count, Any *result);
#ifdef WORKSPACE
extern void *TVMBackendAllocWorkspace(int, int, uint64_t, int, int);
void *workspace(void) { return TVMBackendAllocWorkspace(1, 0, 64, 0, 0); }
#endif

void *__tvm_ffi__library_ctx;
#include "packed.h"

static void *kernel;

int __tvm_ffi_main(void *self, Any *given, int32_t count, Any *result) {
  static int calls;
  uint64_t map[16];
  void *first = ((Dense *)given[0].pointer)->data, *second = ((Dense *)given[1].pointer)->data;
  if (count != 3) return -1;
  if (!kernel && TVMBackendGetFuncFromEnv(__tvm_ffi__library_ctx, "toy_kernel", &kernel)) return -1;
  for (int i = 0; i < 16; i++) map[i] = 100 + i;
  map[0] = (uint64_t)second;
#ifdef TWISTED
  map[0] ^= 1;
#endif
  Any rest[] = {
      {POINTER, 0, .pointer = map}, {POINTER, 0, .pointer = first}, {FLOAT, 0, .real = 0.5},
      {INT, 0, .number = given[2].number}, {INT, 0, .number = 7}, {INT, 0, .number = 3},
      {INT, 0, .number = 256}, {INT, 0, .number = 4096},
  };
  int times = 1;
#ifdef UNEVEN
  times += calls++ % 2;
#endif
  for (int i = 0; i < times; i++) {
    memset(result, 0, sizeof *result);
    if (TVMFFIFunctionCall(kernel, rest, 8, result)) return -1;
  }
  return 0;
}
