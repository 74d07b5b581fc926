/* The functions of the CUDA runtime that ONNX Runtime's CUDA provider calls, without a device: memory is the host's, kernels
   are not run, and what is put into streams, waited for and captured is written to the file $CUDA_LOG, a line each.
   For tools/cuda_provider.py. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
static FILE* lg(){ static FILE*f; if(!f){const char*p=getenv("CUDA_LOG"); f=p?fopen(p,"a"):stderr; setvbuf(f,0,_IOLBF,0);} return f; }
#define L(...) fprintf(lg(), __VA_ARGS__)
static int capturing=0;
#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceCount(int*n){*n=1;return 0;}
cudaError_t cudaGetDevice(int*n){*n=0;return 0;}
cudaError_t cudaSetDevice(int n){return 0;}
cudaError_t cudaDriverGetVersion(int*n){*n=13000;return 0;}
cudaError_t cudaRuntimeGetVersion(int*n){*n=13000;return 0;}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp*p,int d){memset(p,0,sizeof*p);strcpy(p->name,"no device");p->totalGlobalMem=80ul<<30;p->major=9;p->minor=0;p->multiProcessorCount=132;p->warpSize=32;p->maxThreadsPerBlock=1024;p->maxThreadsPerMultiProcessor=2048;p->sharedMemPerBlock=49152;p->sharedMemPerBlockOptin=232448;p->sharedMemPerMultiprocessor=233472;p->regsPerBlock=65536;p->regsPerMultiprocessor=65536;p->maxGridSize[0]=2147483647;p->maxGridSize[1]=p->maxGridSize[2]=65535;p->maxThreadsDim[0]=p->maxThreadsDim[1]=1024;p->maxThreadsDim[2]=64;p->unifiedAddressing=1;p->managedMemory=1;p->concurrentKernels=1;p->l2CacheSize=52428800;return 0;}
cudaError_t cudaDeviceGetAttribute(int*v,enum cudaDeviceAttr a,int d){switch(a){case cudaDevAttrComputeCapabilityMajor:*v=9;break;case cudaDevAttrComputeCapabilityMinor:*v=0;break;case cudaDevAttrMultiProcessorCount:*v=132;break;case cudaDevAttrMaxSharedMemoryPerBlockOptin:*v=232448;break;case cudaDevAttrMaxThreadsPerBlock:*v=1024;break;default:*v=1;}return 0;}
cudaError_t cudaMalloc(void**p,size_t n){*p=aligned_alloc(256,(n+511)/256*256);L("malloc %zu%s\n",n,capturing?" DURING CAPTURE":"");return 0;}
cudaError_t cudaFree(void*p){L("free%s\n",capturing?" DURING CAPTURE":"");return 0;}
cudaError_t cudaHostAlloc(void**p,size_t n,unsigned f){*p=aligned_alloc(4096,(n+8191)/4096*4096);L("hostalloc %zu\n",n);return 0;}
cudaError_t cudaMallocHost(void**p,size_t n){return cudaHostAlloc(p,n,0);}
cudaError_t cudaFreeHost(void*p){return 0;}
cudaError_t cudaMemGetInfo(size_t*f,size_t*t){*f=70ul<<30;*t=80ul<<30;return 0;}
cudaError_t cudaMemcpy(void*d,const void*s,size_t n,enum cudaMemcpyKind k){L("memcpy SYNC %zu kind %d%s\n",n,k,capturing?" DURING CAPTURE":"");memcpy(d,s,n);return 0;}
cudaError_t cudaMemcpyAsync(void*d,const void*s,size_t n,enum cudaMemcpyKind k,cudaStream_t st){L("memcpyAsync %zu kind %d stream %p%s\n",n,k,(void*)st,capturing?" cap":"");memcpy(d,s,n);return 0;}
cudaError_t cudaMemset(void*d,int v,size_t n){memset(d,v,n);return 0;}
cudaError_t cudaMemsetAsync(void*d,int v,size_t n,cudaStream_t s){L("memsetAsync %zu stream %p\n",n,(void*)s);memset(d,v,n);return 0;}
cudaError_t cudaStreamCreate(cudaStream_t*s){static long n=100;*s=(void*)n++;L("streamCreate %p\n",(void*)*s);return 0;}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*s,unsigned f){return cudaStreamCreate(s);}
cudaError_t cudaStreamSynchronize(cudaStream_t s){L("streamSynchronize %p\n",(void*)s);return 0;}
cudaError_t cudaDeviceSynchronize(void){L("deviceSynchronize\n");return 0;}
cudaError_t cudaEventSynchronize(cudaEvent_t e){L("eventSynchronize\n");return 0;}
cudaError_t cudaEventCreate(cudaEvent_t*e){static long n=1000;*e=(void*)n++;return 0;}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*e,unsigned f){return cudaEventCreate(e);}
cudaError_t cudaEventElapsedTime(float*t,cudaEvent_t a,cudaEvent_t b){*t=1;return 0;}
cudaError_t cudaStreamWaitEvent(cudaStream_t s,cudaEvent_t e,unsigned f){L("streamWaitEvent %p %p\n",(void*)s,(void*)e);return 0;}
cudaError_t cudaEventRecord(cudaEvent_t e,cudaStream_t s){L("eventRecord %p stream %p\n",(void*)e,(void*)s);return 0;}
cudaError_t cudaStreamIsCapturing(cudaStream_t s,enum cudaStreamCaptureStatus*c){*c=capturing?cudaStreamCaptureStatusActive:cudaStreamCaptureStatusNone;return 0;}
cudaError_t cudaStreamBeginCapture(cudaStream_t s,enum cudaStreamCaptureMode m){L("beginCapture %p mode %d\n",(void*)s,m);capturing=1;return 0;}
cudaError_t cudaStreamEndCapture(cudaStream_t s,cudaGraph_t*g){L("endCapture %p\n",(void*)s);capturing=0;*g=(void*)7;return 0;}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*e,cudaGraph_t g,unsigned long long f){*e=(void*)8;return 0;}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e,cudaStream_t s){L("graphLaunch %p\n",(void*)s);return 0;}
cudaError_t cudaLaunchHostFunc(cudaStream_t s,cudaHostFn_t f,void*u){L("launchHostFunc%s\n",capturing?" cap":"");f(u);return 0;}
cudaError_t cudaLaunchKernel(const void*f,dim3 g,dim3 b,void**a,size_t m,cudaStream_t s){L("kernel stream %p%s\n",(void*)s,capturing?" cap":"");return 0;}
cudaError_t __cudaLaunchKernel(const void*f,dim3 g,dim3 b,void**a,size_t m,cudaStream_t s){L("kernel stream %p%s\n",(void*)s,capturing?" cap":"");return 0;}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*c,const void*f,void**a){L("kernel stream %p%s\n",(void*)c->stream,capturing?" cap":"");return 0;}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes*a,const void*p){memset(a,0,sizeof*a);a->type=cudaMemoryTypeDevice;return 0;}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes*a,const void*f){memset(a,0,sizeof*a);a->maxThreadsPerBlock=1024;return 0;}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int*n,const void*f,int b,size_t s,unsigned fl){*n=2;return 0;}
const char* cudaGetErrorString(cudaError_t e){return "none";} const char* cudaGetErrorName(cudaError_t e){return "none";}
cudaError_t cudaMemcpy2DAsync(void*d,size_t dp,const void*s,size_t sp,size_t w,size_t h,enum cudaMemcpyKind k,cudaStream_t st){L("memcpy2D\n");return 0;}
cudaError_t cudaGetDriverEntryPointByVersion(const char*n,void**p,unsigned v,unsigned long long f,enum cudaDriverEntryPointQueryResult*r){*p=0;return 0;}
void** __cudaRegisterFatBinary(void*x){static void*h;return &h;}
static __thread dim3 G,B;static __thread size_t M;static __thread void*S;
unsigned __cudaPushCallConfiguration(dim3 g,dim3 b,size_t m,void*s){G=g;B=b;M=m;S=s;return 0;}
unsigned __cudaPopCallConfiguration(dim3*g,dim3*b,size_t*m,void*s){*g=G;*b=B;*m=M;*(void**)s=S;return 0;}
