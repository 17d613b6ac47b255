//go:build !cgo || !linux

package gpu

import "fmt"

// Open answers that this program cannot use NVML.
func Open(Options) (Source, error) {
	return None{}, fmt.Errorf("%w: this program was built without cgo or not for Linux", ErrNoNVML)
}
