/* The fake's devices and their contexts: only each device's primary one. */
#include "fake.h"

#include <stdio.h>

static struct context contexts[MAX_DEVICES] = {
    {.device = 0},  {.device = 1},  {.device = 2},  {.device = 3},  {.device = 4},  {.device = 5},
    {.device = 6},  {.device = 7},  {.device = 8},  {.device = 9},  {.device = 10}, {.device = 11},
    {.device = 12}, {.device = 13}, {.device = 14}, {.device = 15},
};
static __thread struct context *stack[32];
static __thread int depth;

/* The ordinal comes first, so that a short prefix of a UUID can tell two devices apart. */
struct uuid uuid_of(int ordinal) {
    return (struct uuid){{0xa0 + ordinal, 0xfa, 0xce, 0xde, 0xfa, 0x4e, 0x4c, 0xda, 0x80, 0, 0, 0, 0, 0, 0, ordinal}};
}

void print_uuid(int ordinal, char *text) {
    struct uuid uuid = uuid_of(ordinal);
    text += sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++)
        text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid.bytes[i]);
}

static CUresult check_device(CUdevice device) {
    TRY(enter());
    return device >= 0 && device < device_count ? OK : INVALID_DEVICE;
}

API cuDriverGetVersion(int *version) {
    return version ? (*version = 13000, OK) : INVALID_VALUE;
}

API cuDeviceGetCount(int *count) {
    TRY(enter());
    return count ? (*count = device_count, OK) : INVALID_VALUE;
}

API cuDeviceGet(CUdevice *device, int ordinal) {
    TRY(check_device(ordinal));
    return device ? (*device = ordinal, OK) : INVALID_VALUE;
}

API cuDeviceGetName(char *name, int size, CUdevice device) {
    TRY(check_device(device));
    if (!name || size <= 0)
        return INVALID_VALUE;
    snprintf(name, size, "Fake GPU");
    return OK;
}

API cuDeviceGetUuid_v2(struct uuid *uuid, CUdevice device) {
    TRY(check_device(device));
    if (control->silent == 1 + physical[device])
        return UNKNOWN;
    return uuid ? (*uuid = uuid_of(physical[device]), OK) : INVALID_VALUE;
}
ALSO(cuDeviceGetUuid)

API cuDeviceTotalMem_v2(size_t *size, CUdevice device) {
    TRY(check_device(device));
    return size ? (*size = memory_per_device, OK) : INVALID_VALUE;
}
ALSO(cuDeviceTotalMem)

API cuDeviceGetPCIBusId(char *text, int size, CUdevice device) {
    TRY(check_device(device));
    if (!text || size < 13)
        return INVALID_VALUE;
    snprintf(text, size, "0000:%02X:00.0", physical[device] + 1);
    return OK;
}

API cuDeviceGetByPCIBusId(CUdevice *device, const char *text) {
    TRY(enter());
    unsigned domain = 0, bus = 0;
    if (!device || !text || (sscanf(text, "%x:%x:%*x", &domain, &bus) != 2 && sscanf(text, "%x:", &bus) != 1))
        return INVALID_VALUE;
    for (int i = 0; i < device_count; i++)
        if (domain == 0 && (int)bus == physical[i] + 1)
            return *device = i, OK;
    return INVALID_DEVICE;
}

API cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    TRY(check_device(device));
    if (!value)
        return INVALID_VALUE;
    switch (attribute) {
    case 16: *value = 4; break;                       /* multiprocessors */
    case 10: *value = 32; break;                      /* threads in a warp */
    case 33: *value = physical[device] + 1; break;    /* PCI bus */
    case 40: *value = 2; break;                       /* copy engines */
    case 19:                                          /* can map host memory */
    case 41:                                          /* one address space */
    case 91:                                          /* host pointers serve for registered memory */
    case 99: *value = 1; break;                       /* can register host memory */
    case 75: *value = 9; break;                       /* compute capability, major; minor 76 is 0 */
    case 102: *value = !control->no_vmm; break;       /* cuMemCreate and its kin */
    case 103: *value = !control->no_posix_fd && !control->no_vmm; break;
    case 110:                                         /* RDMA into cuMemCreate's memory */
    case 116: *value = !control->no_rdma; break;      /* RDMA */
    case 128: *value = !control->no_fabric && !control->no_vmm; break;
    default: *value = 0;
    }
    return OK;
}

/* Contexts */

CUresult enter_context(struct context **current) {
    TRY(enter());
    *current = depth ? stack[depth - 1] : NULL;
    if (!*current)
        return INVALID_CONTEXT;
    return (*current)->retained > 0 ? OK : CONTEXT_IS_DESTROYED;
}

CUcontext context_of(CUdevice device) {
    return &contexts[device];
}

struct context *known_context(CUcontext context) {
    return context >= contexts && context < contexts + device_count ? context : NULL;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    TRY(check_device(device));
    if (!context)
        return INVALID_VALUE;
    contexts[device].retained++;
    counters->contexts++;
    *context = &contexts[device];
    return OK;
}

API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    TRY(check_device(device));
    int held = contexts[device].retained;
    while (held > 0)
        if (atomic_compare_exchange_weak(&contexts[device].retained, &held, held - 1))
            {
            counters->contexts--;
            return OK;
        }
    return INVALID_CONTEXT;
}
ALSO(cuDevicePrimaryCtxRelease)

API cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    TRY(check_device(device));
    if (!flags || !active)
        return INVALID_VALUE;
    *flags = 0;
    *active = contexts[device].retained > 0;
    return OK;
}

API cuCtxPushCurrent_v2(CUcontext context) {
    TRY(enter());
    if (!known_context(context) || depth == (int)(sizeof stack / sizeof *stack))
        return INVALID_CONTEXT;
    stack[depth++] = context;
    return OK;
}
ALSO(cuCtxPushCurrent)

API cuCtxPopCurrent_v2(CUcontext *context) {
    TRY(enter());
    if (!depth)
        return INVALID_CONTEXT;
    depth--;
    if (context)
        *context = stack[depth];
    return OK;
}
ALSO(cuCtxPopCurrent)

API cuCtxSetCurrent(CUcontext context) {
    TRY(enter());
    if (context && !known_context(context))
        return INVALID_CONTEXT;
    if (depth)
        depth--;
    if (context)
        stack[depth++] = context;
    return OK;
}

API cuCtxGetCurrent(CUcontext *context) {
    TRY(enter());
    return context ? (*context = depth ? stack[depth - 1] : NULL, OK) : INVALID_VALUE;
}

API cuCtxGetDevice(CUdevice *device) {
    struct context *current;
    TRY(enter_context(&current));
    return device ? (*device = current->device, OK) : INVALID_VALUE;
}
