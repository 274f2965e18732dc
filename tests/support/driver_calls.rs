//! Calls of the driver that tests of failing ones have to know.

/// Calls that may fail without an error: those that only give back, when nobody is left to tell, and the questions
/// what a device can do, which then is taken to be able to do less.
pub(crate) const QUIET: [&str; 15] = [
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetCurrent",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRelease_v2",
    "cuEventDestroy_v2",
    "cuMemAddressFree",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemHostUnregister",
    "cuMemRelease",
    "cuMemUnmap",
    "cuModuleUnload",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
];

/// Calls that are made as often as time passes; the first of them stand for all.
pub(crate) const ASKED_OFTEN: [&str; 4] =
    ["cuEventQuery", "cuStreamQuery", "cuCtxPopCurrent_v2", "cuDeviceGetAttribute"];
