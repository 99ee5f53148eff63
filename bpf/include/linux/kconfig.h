/* bcc includes this first and wants to be told that the kernel has bpf(2). */
#define CONFIG_BPF_SYSCALL 1
