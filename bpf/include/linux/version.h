/* bcc asks for a version; sk_reuseport programs are bound to none. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 5, 0)
