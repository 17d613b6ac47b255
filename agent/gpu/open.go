package gpu

import "time"

// Options of Open. The zero value is right for a host with a driver.
type Options struct {
	// Library is the path of libnvidia-ml.so.1. Empty: the loader's search path, then where container runtimes and WSL put it.
	Library string
	// IgnoreXIDs are errors that leave a GPU healthy, beside those that applications cause.
	IgnoreXIDs []uint64
	// ProbeEvery is how often Watch asks every GPU whether it still answers; 0: DefaultProbe.
	ProbeEvery time.Duration
}

// DefaultProbe is how often Watch asks GPUs that report no errors whether they are still there.
const DefaultProbe = 5 * time.Second

// defaultLibraries are tried in this order when Options name none.
var defaultLibraries = []string{
	"libnvidia-ml.so.1",
	"/usr/local/nvidia/lib64/libnvidia-ml.so.1",
	"/run/nvidia/driver/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
	"/run/nvidia/driver/usr/lib/aarch64-linux-gnu/libnvidia-ml.so.1",
	"/usr/lib/wsl/lib/libnvidia-ml.so.1",
}
