// The part of ONNX Runtime's C ABI that a custom operator needs, so that building takes a compiler and nothing else.
//
// OrtApi is a table of function pointers that is only ever appended to: a function's index is fixed once released.
// Each member used here is followed by a check of its index in the official table; the rest is padding.

#pragma once

#include <cstddef>
#include <cstdint>

namespace moevlm::ort {

// The first version with KernelContext_ParallelFor (ONNX Runtime 1.17).
constexpr uint32_t kApiVersion = 17;

struct Status;
struct Value;
struct ShapeInfo;
struct SessionOptions;
struct OpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct CustomOp;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

using Unused = void (*)();

struct Api {
    Status* (*create_status)(ErrorCode, const char* message);
    Unused unused_1[25];
    Status* (*create_op_domain)(const char* name, OpDomain**);
    Status* (*op_domain_add)(OpDomain*, const CustomOp*);
    Status* (*add_op_domain)(SessionOptions*, OpDomain*);
    Unused unused_29[22];
    Status* (*tensor_data)(Value*, void**);
    Unused unused_52[8];
    Status* (*element_type)(const ShapeInfo*, ElementType*);
    Status* (*dimensions_count)(const ShapeInfo*, size_t*);
    Status* (*dimensions)(const ShapeInfo*, int64_t*, size_t count);
    Unused unused_63[2];
    Status* (*type_and_shape)(const Value*, ShapeInfo**);
    Unused unused_66[19];
    Status* (*attribute_float)(const KernelInfo*, const char* name, float*);
    Status* (*attribute_int)(const KernelInfo*, const char* name, int64_t*);
    // size: of the buffer; becomes that of the value, with its final zero.
    Status* (*attribute_string)(const KernelInfo*, const char* name, char*, size_t* size);
    Status* (*input_count)(const KernelContext*, size_t*);
    Unused unused_89[1];
    Status* (*input)(const KernelContext*, size_t index, const Value**);
    Status* (*output)(KernelContext*, size_t index, const int64_t* dimensions, size_t count, Value**);
    Unused unused_92[1];
    void (*release_status)(Status*);
    Unused unused_94[5];
    void (*release_shape_info)(ShapeInfo*);
    Unused unused_100[1];
    void (*release_op_domain)(OpDomain*);
    Unused unused_102[172];
    // Calls task(data, i) for every i < total on the session's threads, and returns when all are done. batches = 0:
    // the threads take the next i as they become free.
    Status* (*parallel_for)(
        const KernelContext*, void (*task)(void* data, size_t i), size_t total, size_t batches, void* data);
};

#define MOEVLM_CHECK_SLOT(member, index) static_assert(offsetof(Api, member) == (index) * sizeof(Unused))
MOEVLM_CHECK_SLOT(create_op_domain, 26);
MOEVLM_CHECK_SLOT(add_op_domain, 28);
MOEVLM_CHECK_SLOT(tensor_data, 51);
MOEVLM_CHECK_SLOT(element_type, 60);
MOEVLM_CHECK_SLOT(dimensions, 62);
MOEVLM_CHECK_SLOT(type_and_shape, 65);
MOEVLM_CHECK_SLOT(attribute_int, 86);
MOEVLM_CHECK_SLOT(attribute_string, 87);
MOEVLM_CHECK_SLOT(input_count, 88);
MOEVLM_CHECK_SLOT(output, 91);
MOEVLM_CHECK_SLOT(release_status, 93);
MOEVLM_CHECK_SLOT(release_shape_info, 99);
MOEVLM_CHECK_SLOT(release_op_domain, 101);
MOEVLM_CHECK_SLOT(parallel_for, 274);
#undef MOEVLM_CHECK_SLOT

struct ApiBase {
    const Api* (*get_api)(uint32_t version);  // null for a version newer than the library
    const char* (*version)();
};

// Members that stay null are not called: variadic arguments, aliasing, and the first version's kernels, which could
// not fail. A derived struct adds what the functions need to tell one operator from another.
struct CustomOp {
    uint32_t version = kApiVersion;
    Unused create_kernel_v1 = nullptr;
    const char* (*name)(const CustomOp*) = nullptr;
    const char* (*execution_provider)(const CustomOp*) = nullptr;
    ElementType (*input_type)(const CustomOp*, size_t) = nullptr;
    size_t (*input_type_count)(const CustomOp*) = nullptr;
    ElementType (*output_type)(const CustomOp*, size_t) = nullptr;
    size_t (*output_type_count)(const CustomOp*) = nullptr;
    Unused compute_v1 = nullptr;
    void (*destroy_kernel)(void* kernel) = nullptr;
    Characteristic (*input_characteristic)(const CustomOp*, size_t) = nullptr;
    Characteristic (*output_characteristic)(const CustomOp*, size_t) = nullptr;
    MemoryType (*input_memory_type)(const CustomOp*, size_t) = nullptr;
    Unused variadic[4] = {};
    Status* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*, void** kernel) = nullptr;
    Status* (*compute)(void* kernel, KernelContext*) = nullptr;
    Status* (*infer_shapes)(const CustomOp*, ShapeInferContext*) = nullptr;
    int (*start_version)(const CustomOp*) = nullptr;
    int (*end_version)(const CustomOp*) = nullptr;
    Unused aliasing[4] = {};
};

}  // namespace moevlm::ort
