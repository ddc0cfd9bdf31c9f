/* A fake of the CUDA driver (libcuda.so.1), for tests on machines without a GPU.
 *
 * Device memory is memfds, streams are threads. What it must get right is what a program can get wrong: whose memory
 * lives how long, which copies have really ended, which errors stay. It runs no kernels.
 */
#pragma once

#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    ECC_UNCORRECTABLE = 214,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999,
};

enum { MAX_DEVICES = 16, POSIX_FD = 1, FABRIC = 8, READ = 1, READ_WRITE = 3 };
#define GRANULARITY ((size_t)2 << 20)

/* The driver's own names where its ABI shows through. */
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUmemHandle;
typedef struct context *CUcontext;
typedef struct stream *CUstream;
typedef struct event *CUevent;

#define API __attribute__((visibility("default"))) CUresult
/* Old programs ask dlsym for the name without its version: it gets the same function. */
#define ALSO(name) extern __typeof__(name##_v2) name __attribute__((alias(#name "_v2"), visibility("default")));

#define TRY(call)                 \
    do {                          \
        CUresult code_ = (call);  \
        if (code_ != OK)          \
            return code_;         \
    } while (0)

/* The rest is internal; hidden, so that no other library's symbol of the same name takes its place. */
#pragma GCC visibility push(hidden)

/* FAKECUDA_DIR/control: what tests ask for. Mirrored by Control in __init__.py. */
struct control {
    _Atomic int64_t fail_allocation, sticky_at, delay_us, no_posix_fd, no_fabric, no_rdma, no_vmm, flip_at,
        fail_register, corrupt_streamer, sticky_import, silent, others_use[MAX_DEVICES];
};

/* FAKECUDA_DIR/counters.<pid>: what this process holds. Mirrored by COUNTERS in __init__.py. */
struct counters {
    _Atomic int64_t contexts, handles, exports, reservations, mappings, allocations, ipc_opened, pinned, streams,
        events;
};

struct context {
    CUdevice device;
    _Atomic int retained;
    struct stream *null_stream;
};

/* driver.c */
extern struct control *control;
extern struct counters *counters;
extern bool strict;
extern int device_count;          /* visible ones */
extern int physical[MAX_DEVICES]; /* visible ordinal -> physical ordinal */
extern int64_t memory_per_device;
CUresult enter(void); /* what every call begins with */
void set_sticky(CUresult code);
CUresult sticky(void);
bool reaches_zero(_Atomic int64_t *countdown);
void lock_allocations(void); /* against every process of the test */
void unlock_allocations(void);
const char *test_name(void); /* tells this test's memfds from another's */

/* devices.c */
struct uuid { unsigned char bytes[16]; };
struct uuid uuid_of(int ordinal); /* physical */
void print_uuid(int ordinal, char *text);
CUresult enter_context(struct context **current); /* enter(), for calls that need a current context */
struct context *known_context(CUcontext context);
CUcontext context_of(CUdevice device);

/* memory.c */
enum { ON_DEVICE = 1 };
struct location { int type, id; };
struct memory { /* one physical allocation, as far as this process holds it */
    struct memory *next;
    int fd;
    CUdevice device;
    size_t size;      /* of the memfd */
    ino_t inode;
    unsigned types;   /* handle types that it may be exported as */
    bool rdma;
    int references;   /* cuMemCreate, import, retain less cuMemRelease */
    int mappings;
};
extern pthread_rwlock_t memory_lock; /* held for reading during a copy, so that nothing is unmapped beneath it */
CUresult hold(int fd, unsigned types, struct memory **memory); /* takes the descriptor; a foreign one is refused */
void forget_if_unused(struct memory *memory);
struct memory *memory_of(CUmemHandle handle);

/* addresses.c */
bool is_granular(size_t size);
size_t whole_granules(size_t size);
enum kind { MAPPED, ALLOCATED, IPC };
struct mapping {
    struct mapping *next;
    CUdeviceptr address;
    size_t size; /* as the program asked: a copy beyond it is an illegal address even where pages reach further */
    struct memory *memory;
    char *alias; /* where the fake's own copies go: the program's address may be inaccessible or read-only */
    enum kind kind;
    int opens;
    unsigned access[MAX_DEVICES];
};
extern struct mapping *mappings;
struct mapping *mapping_at(CUdeviceptr address);
bool is_device_address(CUdeviceptr address);
char *device_bytes(CUdeviceptr address, CUdevice device, unsigned right, size_t *available);
CUresult map_legacy(struct memory *memory, size_t size, enum kind kind, CUdeviceptr *address);
void unmap(struct mapping *mapping, bool keep_reserved);

/* pointers.c */
bool is_pinned(uintptr_t address, size_t size, bool *by_driver);

/* streams.c */
struct operation {
    struct operation *next;
    void (*perform)(struct operation *);
    void *subject;
};
CUresult stream_of(CUstream handle, struct context *current, struct stream **stream);
CUresult submit(struct stream *stream, struct operation operation, bool wait);

#pragma GCC visibility pop
