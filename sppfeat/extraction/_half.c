/* Numbers of 32 bits to numbers of 16 bits, on x86 processors with F16C: to the nearest, ties to even, as NumPy rounds,
which takes one at a time. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 8

__attribute__((target("avx,f16c"))) static void round_values(const float *values, uint16_t *out, Py_ssize_t count)
{
    Py_ssize_t at = 0;
    for (; at + WIDTH <= count; at += WIDTH)
        _mm_storeu_si128((__m128i *)(out + at), _mm256_cvtps_ph(_mm256_loadu_ps(values + at), _MM_FROUND_TO_NEAREST_INT));
    if (at < count) {
        float last[WIDTH] = {0};
        uint16_t rounded[WIDTH];
        memcpy(last, values + at, (count - at) * sizeof(float));
        _mm_storeu_si128((__m128i *)rounded, _mm256_cvtps_ph(_mm256_loadu_ps(last), _MM_FROUND_TO_NEAREST_INT));
        memcpy(out + at, rounded, (count - at) * sizeof(uint16_t));
    }
}

static PyObject *to_half(PyObject *self, PyObject *args)
{
    Py_buffer values, out;
    if (!PyArg_ParseTuple(args, "y*w*", &values, &out))
        return NULL;
    Py_ssize_t count = values.len / (Py_ssize_t)sizeof(float);
    int fits = values.len == count * (Py_ssize_t)sizeof(float) && out.len == count * (Py_ssize_t)sizeof(uint16_t);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        round_values(values.buf, out.buf, count);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "expected as many numbers of 16 bits as of 32");
    return NULL;
}

static PyObject *runs(PyObject *self, PyObject *ignored)
{
    unsigned int a, b, c = 0, d;
    return PyBool_FromLong(__builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C));
}

static PyMethodDef methods[] = {
    {"runs", runs, METH_NOARGS, "Whether this processor has F16C."},
    {"to_half", to_half, METH_VARARGS, "to_half(values, out): float32 to float16, both contiguous."},
    {NULL, NULL, 0, NULL}};

#else

static PyObject *runs(PyObject *self, PyObject *ignored)
{
    return PyBool_FromLong(0);
}

static PyMethodDef methods[] = {{"runs", runs, METH_NOARGS, "False: there is no code for this processor."},
                                {NULL, NULL, 0, NULL}};

#endif

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_half", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__half(void)
{
    return PyModule_Create(&module);
}
