//go:build cgo && linux

package gpu

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/dl"
	"github.com/NVIDIA/go-nvml/pkg/nvml"
)

// nvmlSource asks NVML. A function that the installed library lacks would end the process when called (the binding resolves
// symbols lazily), so every call names its symbol and goes through get, which looks first.
type nvmlSource struct {
	lib    nvml.Interface
	opts   Options
	ignore map[uint64]bool
	ledger ledger

	mu      sync.Mutex
	symbols map[string]bool
	ecc     map[string]uint64 // uncorrected errors of each GPU when they were counted last
	known   map[int]reading   // last complete one of each index, for GPUs that stopped answering
	handles []handle
}

// handle ties NVML's name of a GPU to ours.
type handle struct {
	index  int
	dev    nvml.Device
	uuid   string
	slices []Slice
}

type reading struct {
	device Device
	handle handle
}

// Open loads NVML and returns a source for it. If that is not possible, it returns None and an error wrapping ErrNoNVML,
// and both can be used: the node has no GPUs that we could manage.
func Open(opts Options) (Source, error) {
	if opts.ProbeEvery == 0 {
		opts.ProbeEvery = DefaultProbe
	}
	names := defaultLibraries
	if opts.Library != "" {
		names = []string{opts.Library}
	}
	name, err := loadLibrary(names)
	if err != nil {
		return None{}, fmt.Errorf("%w: %w", ErrNoNVML, err)
	}
	n := &nvmlSource{
		lib: nvml.New(nvml.WithLibraryPath(name)), opts: opts, ignore: make(map[uint64]bool),
		symbols: make(map[string]bool), known: make(map[int]reading), ecc: make(map[string]uint64),
	}
	for _, xid := range append(appXIDs, opts.IgnoreXIDs...) {
		n.ignore[xid] = true
	}
	if ret := n.lib.Init(); ret != nvml.SUCCESS {
		return None{}, fmt.Errorf("%w: %s does not start: %w", ErrNoNVML, name, n.failure(ret))
	}
	return n, nil
}

// loadLibrary finds the first library that can be loaded and has what initialising needs. It stays loaded for the life of
// the process: the binding's resolved symbols would dangle if a later Close unloaded it.
func loadLibrary(names []string) (string, error) {
	var first error
	for _, name := range names {
		l := dl.New(name, dl.RTLD_LAZY|dl.RTLD_GLOBAL)
		if err := l.Open(); err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		for _, symbol := range []string{"nvmlInit_v2", "nvmlShutdown"} {
			if err := l.Lookup(symbol); err != nil {
				return "", fmt.Errorf("%s is not NVML: %w", name, err)
			}
		}
		return name, nil
	}
	if others := names[1:]; len(others) > 0 {
		return "", fmt.Errorf("%w, nor is it at %s", first, strings.Join(others, ", "))
	}
	return "", first
}

// has reports whether the library has one of the symbols.
func (n *nvmlSource) has(symbols ...string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range symbols {
		found, asked := n.symbols[s]
		if !asked {
			found = n.lib.Extensions().LookupSymbol(s) == nil
			n.symbols[s] = found
		}
		if found {
			return true
		}
	}
	return false
}

// get calls f if the library has one of the symbols that it may need.
func get[T any](n *nvmlSource, f func() (T, nvml.Return), symbols ...string) (T, nvml.Return) {
	if !n.has(symbols...) {
		var zero T
		return zero, nvml.ERROR_FUNCTION_NOT_FOUND
	}
	return f()
}

// maybe is get for what a GPU may not support: then ok is false and v is zero.
func maybe[T any](n *nvmlSource, f func() (T, nvml.Return), symbols ...string) (v T, ok bool) {
	got, ret := get(n, f, symbols...)
	if ret == nvml.SUCCESS {
		v = got
	}
	return v, ret == nvml.SUCCESS
}

// failure turns a return value into an error without asking the library for the text, which it may not have.
func (n *nvmlSource) failure(ret nvml.Return) error {
	switch ret {
	case nvml.ERROR_DRIVER_NOT_LOADED:
		return errors.New("the NVIDIA kernel driver is not loaded")
	case nvml.ERROR_LIB_RM_VERSION_MISMATCH:
		return errors.New("the library and the kernel driver have different versions; reboot after a driver upgrade")
	case nvml.ERROR_NO_PERMISSION:
		return errors.New("no permission to use the NVIDIA driver")
	case nvml.ERROR_GPU_IS_LOST:
		return errors.New("the GPU is lost: it has fallen off the bus or is otherwise inaccessible")
	case nvml.ERROR_RESET_REQUIRED:
		return errors.New("the GPU needs a reset")
	case nvml.ERROR_FUNCTION_NOT_FOUND:
		return errors.New("the installed library is too old: it lacks the function")
	}
	return fmt.Errorf("NVML returns %s", ret.String())
}

// Inventory reads every GPU. One that does not answer appears as it was last read, unhealthy.
func (n *nvmlSource) Inventory() (Inventory, error) {
	var inv Inventory
	inv.DriverVersion, _ = maybe(n, n.lib.SystemGetDriverVersion, "nvmlSystemGetDriverVersion")
	if v, ok := maybe(n, n.lib.SystemGetCudaDriverVersion, "nvmlSystemGetCudaDriverVersion"); ok {
		inv.CUDAVersion = fmt.Sprintf("%d.%d", v/1000, v%1000/10)
	}
	count, ret := get(n, n.lib.DeviceGetCount, "nvmlDeviceGetCount_v2", "nvmlDeviceGetCount")
	if ret != nvml.SUCCESS {
		return Inventory{}, fmt.Errorf("count GPUs: %w", n.failure(ret))
	}
	handles := []handle{}
	defer func() { n.link(inv.Devices, handles) }()
	for i := range count {
		r, ret := n.read(i)
		n.mu.Lock()
		old, seen := n.known[i]
		if ret == nvml.SUCCESS {
			n.known[i] = r
		}
		n.mu.Unlock()
		if ret != nvml.SUCCESS && !seen {
			inv.Warnings = append(inv.Warnings, fmt.Sprintf("GPU %d is left out: %v", i, n.failure(ret)))
			continue
		}
		if ret != nvml.SUCCESS {
			n.ledger.fail(old.device.UUID, fault{reason: n.failure(ret).Error(), lost: true})
			r = old
		}
		r.device.Health = n.ledger.health(r.device.UUID)
		inv.Devices = append(inv.Devices, r.device)
		handles = append(handles, r.handle)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.handles = handles
	return inv, nil
}

// read asks one GPU everything. Only what identifies it must be answered.
func (n *nvmlSource) read(index int) (reading, nvml.Return) {
	byIndex := func() (nvml.Device, nvml.Return) { return n.lib.DeviceGetHandleByIndex(index) }
	dev, ret := get(n, byIndex, "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex")
	if ret != nvml.SUCCESS {
		return reading{}, ret
	}
	d := Device{Index: index, Minor: -1, NUMANode: -1, MIG: Disabled}
	if d.UUID, ret = get(n, dev.GetUUID, "nvmlDeviceGetUUID"); ret != nvml.SUCCESS {
		return reading{}, ret
	}
	if d.Model, ret = get(n, dev.GetName, "nvmlDeviceGetName"); ret != nvml.SUCCESS {
		return reading{}, ret
	}
	mem, ret := get(n, dev.GetMemoryInfo, "nvmlDeviceGetMemoryInfo")
	if silent(ret) {
		return reading{}, ret
	}
	d.MemoryMiB = mib(mem.Total)
	if v, ok := maybe(n, dev.GetBAR1MemoryInfo, "nvmlDeviceGetBAR1MemoryInfo"); ok {
		d.BAR1MiB = mib(v.Bar1Total)
	}
	if v, ok := maybe(n, dev.GetMinorNumber, "nvmlDeviceGetMinorNumber"); ok {
		d.Minor = v
	}
	if v, ok := maybe(n, dev.GetPciInfo, "nvmlDeviceGetPciInfo_v3"); ok {
		d.PCIBusID = cString(v.BusId[:])
		d.NUMANode = numaNode("/sys", d.PCIBusID)
	}
	generation, ok := maybe(n, dev.GetMaxPcieLinkGeneration, "nvmlDeviceGetMaxPcieLinkGeneration")
	if width, ok2 := maybe(n, dev.GetMaxPcieLinkWidth, "nvmlDeviceGetMaxPcieLinkWidth"); ok && ok2 {
		d.PCIBandwidth = pciBandwidth(generation, width)
	}
	if v, ok := maybe(n, dev.GetPowerManagementLimit, "nvmlDeviceGetPowerManagementLimit"); ok {
		d.PowerLimitW = int64(v) / 1000
	}
	for kind, into := range map[nvml.ClockType]*int64{nvml.CLOCK_GRAPHICS: &d.CoreClockMHz, nvml.CLOCK_MEM: &d.MemoryClockMHz} {
		clock := func() (uint32, nvml.Return) { return dev.GetMaxClockInfo(kind) }
		if v, ok := maybe(n, clock, "nvmlDeviceGetMaxClockInfo"); ok {
			*into = int64(v)
		}
	}
	capability := func() (string, nvml.Return) {
		major, minor, ret := dev.GetCudaComputeCapability()
		return fmt.Sprintf("%d.%d", major, minor), ret
	}
	d.ComputeCapability, _ = maybe(n, capability, "nvmlDeviceGetCudaComputeCapability")
	d.Display = n.mode(dev.GetDisplayMode, "nvmlDeviceGetDisplayMode")
	d.Persistence = n.mode(dev.GetPersistenceMode, "nvmlDeviceGetPersistenceMode")
	d.ECC = n.mode(func() (nvml.EnableState, nvml.Return) { now, _, ret := dev.GetEccMode(); return now, ret }, "nvmlDeviceGetEccMode")
	migMode := func() (int, nvml.Return) { now, _, ret := dev.GetMigMode(); return now, ret }
	if v, ok := maybe(n, migMode, "nvmlDeviceGetMigMode"); ok && v == nvml.DEVICE_MIG_ENABLE {
		d.MIG = Enabled
		d.Slices = n.slices(dev, d.MemoryMiB)
	}
	return reading{d, handle{index: index, dev: dev, uuid: d.UUID, slices: d.Slices}}, nvml.SUCCESS
}

// silent tells a GPU that is gone from one that merely does not support a question.
func silent(ret nvml.Return) bool {
	return ret == nvml.ERROR_GPU_IS_LOST || ret == nvml.ERROR_RESET_REQUIRED || ret == nvml.ERROR_UNKNOWN
}

func (n *nvmlSource) mode(f func() (nvml.EnableState, nvml.Return), symbol string) Switch {
	v, ok := maybe(n, f, symbol)
	switch {
	case !ok:
		return ""
	case v == nvml.FEATURE_ENABLED:
		return Enabled
	}
	return Disabled
}

// migHandles calls f for each MIG device of a GPU. The numbers in between may be free.
func (n *nvmlSource) migHandles(dev nvml.Device, f func(nvml.Device)) {
	count, _ := maybe(n, dev.GetMaxMigDeviceCount, "nvmlDeviceGetMaxMigDeviceCount")
	for i := range count {
		byIndex := func() (nvml.Device, nvml.Return) { return dev.GetMigDeviceHandleByIndex(i) }
		if m, ok := maybe(n, byIndex, "nvmlDeviceGetMigDeviceHandleByIndex"); ok {
			f(m)
		}
	}
}

func (n *nvmlSource) slices(dev nvml.Device, total int64) (all []Slice) {
	n.migHandles(dev, func(m nvml.Device) {
		var s Slice
		var ok bool
		if s.UUID, ok = maybe(n, m.GetUUID, "nvmlDeviceGetUUID"); !ok {
			return // it was destroyed between the two questions
		}
		if mem, ok := maybe(n, m.GetMemoryInfo, "nvmlDeviceGetMemoryInfo"); ok {
			s.MemoryMiB = mib(mem.Total)
		}
		s.GPU, _ = maybe(n, m.GetGpuInstanceId, "nvmlDeviceGetGpuInstanceId")
		s.Compute, _ = maybe(n, m.GetComputeInstanceId, "nvmlDeviceGetComputeInstanceId")
		if name, ok := maybe(n, m.GetName, "nvmlDeviceGetName"); ok {
			s.Profile = profile(name)
		}
		if a, ok := maybe(n, m.GetAttributes, "nvmlDeviceGetAttributes_v2", "nvmlDeviceGetAttributes"); ok && s.Profile == "" {
			s.Profile = profileOf(int(a.ComputeInstanceSliceCount), int(a.GpuInstanceSliceCount), int64(a.MemorySizeMB), total)
		}
		s.Health = n.ledger.health(s.UUID)
		all = append(all, s)
	})
	return all
}

// profileOf names a slice that does not name itself: compute slices, GPU slices and memory, the latter counted in eighths
// of the GPU's memory as NVIDIA's tools do ("MIG device names" in its MIG user guide).
func profileOf(compute, gpu int, sliceMiB, totalMiB int64) string {
	gb := sliceMiB >> 10
	if totalMiB > 0 {
		eighths := math.Round(float64(sliceMiB) / float64(totalMiB) * 8)
		gb = int64(math.Round(eighths / 8 * math.Ceil(float64(totalMiB)/1024)))
	}
	name := fmt.Sprintf("%dg.%dgb", gpu, gb)
	if compute != gpu {
		name = fmt.Sprintf("%dc.", compute) + name
	}
	return name
}

// Stats measures every GPU and slice of the last Inventory; the first call takes one.
func (n *nvmlSource) Stats() ([]Stats, error) {
	handles, err := n.current()
	if err != nil {
		return nil, err
	}
	var all []Stats
	for _, h := range handles {
		if s, ok := n.measure(h.dev, h.uuid); ok {
			all = append(all, s)
		}
		if len(h.slices) > 0 {
			n.migHandles(h.dev, func(m nvml.Device) {
				if uuid, ok := maybe(n, m.GetUUID, "nvmlDeviceGetUUID"); ok {
					if s, ok := n.measure(m, uuid); ok {
						all = append(all, s)
					}
				}
			})
		}
	}
	return all, nil
}

// current returns the handles of the last Inventory, taking one if there was none.
func (n *nvmlSource) current() ([]handle, error) {
	n.mu.Lock()
	handles := n.handles
	n.mu.Unlock()
	if handles != nil {
		return handles, nil
	}
	if _, err := n.Inventory(); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.handles, nil
}

// measure asks a GPU or slice what it does; ok is false when it does not answer at all.
func (n *nvmlSource) measure(dev nvml.Device, uuid string) (s Stats, ok bool) {
	s = Stats{UUID: uuid, Time: time.Now()}
	mem, ret := get(n, dev.GetMemoryInfo, "nvmlDeviceGetMemoryInfo")
	switch {
	case ret == nvml.SUCCESS:
		s.MemoryMiB, s.UsedMiB = ptr(mib(mem.Total)), ptr(mib(mem.Used))
	case silent(ret):
		return s, false
	}
	if v, ok := maybe(n, dev.GetUtilizationRates, "nvmlDeviceGetUtilizationRates"); ok {
		s.GPUPercent, s.MemoryPercent = ptr(int64(v.Gpu)), ptr(int64(v.Memory))
	}
	percent := func(f func() (uint32, uint32, nvml.Return), symbol string) *int64 {
		v, ok := maybe(n, func() (uint32, nvml.Return) { v, _, ret := f(); return v, ret }, symbol)
		return ptrIf(int64(v), ok)
	}
	s.EncoderPercent = percent(dev.GetEncoderUtilization, "nvmlDeviceGetEncoderUtilization")
	s.DecoderPercent = percent(dev.GetDecoderUtilization, "nvmlDeviceGetDecoderUtilization")
	if v, ok := maybe(n, dev.GetBAR1MemoryInfo, "nvmlDeviceGetBAR1MemoryInfo"); ok {
		s.BAR1MiB, s.BAR1UsedMiB = ptr(mib(v.Bar1Total)), ptr(mib(v.Bar1Used))
	}
	s.TemperatureC = n.temperature(dev)
	if v, ok := maybe(n, dev.GetPowerUsage, "nvmlDeviceGetPowerUsage"); ok {
		s.PowerW = ptr(int64(v) / 1000)
	}
	if v, ok := maybe(n, dev.GetPowerManagementLimit, "nvmlDeviceGetPowerManagementLimit"); ok {
		s.PowerLimitW = ptr(int64(v) / 1000)
	}
	for at, into := range map[nvml.MemoryLocation]**int64{
		nvml.MEMORY_LOCATION_L1_CACHE: &s.ECCL1, nvml.MEMORY_LOCATION_L2_CACHE: &s.ECCL2, nvml.MEMORY_LOCATION_DRAM: &s.ECCMemory,
	} {
		count := func() (uint64, nvml.Return) {
			return dev.GetMemoryErrorCounter(nvml.MEMORY_ERROR_TYPE_CORRECTED, nvml.VOLATILE_ECC, at)
		}
		v, ok := maybe(n, count, "nvmlDeviceGetMemoryErrorCounter")
		*into = ptrIf(int64(v), ok)
	}
	uncorrected := func() (uint64, nvml.Return) {
		return dev.GetTotalEccErrors(nvml.MEMORY_ERROR_TYPE_UNCORRECTED, nvml.VOLATILE_ECC)
	}
	v, ok := maybe(n, uncorrected, "nvmlDeviceGetTotalEccErrors")
	s.ECCUncorrected = ptrIf(int64(v), ok)
	processes, _ := maybe(n, dev.GetComputeRunningProcesses, "nvmlDeviceGetComputeRunningProcesses_v3",
		"nvmlDeviceGetComputeRunningProcesses_v2", "nvmlDeviceGetComputeRunningProcesses")
	for _, p := range processes {
		used := int64(-1)
		if p.UsedGpuMemory != math.MaxUint64 { // NVML_VALUE_NOT_AVAILABLE
			used = mib(p.UsedGpuMemory)
		}
		s.Processes = append(s.Processes, Process{PID: int(p.Pid), UsedMiB: used})
	}
	return s, true
}

func (n *nvmlSource) temperature(dev nvml.Device) *int64 {
	versioned := func() (int64, nvml.Return) {
		t, ret := dev.GetTemperatureV().V1()
		return int64(t.Temperature), ret
	}
	if v, ok := maybe(n, versioned, "nvmlDeviceGetTemperatureV"); ok {
		return ptr(v)
	}
	plain := func() (uint32, nvml.Return) {
		return dev.GetTemperature(nvml.TEMPERATURE_GPU) // drivers before 570 have no other
	}
	v, ok := maybe(n, plain, "nvmlDeviceGetTemperature")
	return ptrIf(int64(v), ok)
}

// Close shuts NVML down.
func (n *nvmlSource) Close() error {
	if ret := n.lib.Shutdown(); ret != nvml.SUCCESS {
		return fmt.Errorf("shut NVML down: %w", n.failure(ret))
	}
	return nil
}

func mib(bytes uint64) int64 { return int64(bytes >> 20) }

func ptr(v int64) *int64 { return &v }

func ptrIf(v int64, ok bool) *int64 {
	if !ok {
		return nil
	}
	return &v
}

// cString is the text of a C array up to its end mark.
func cString(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

// lanes is what one PCI Express lane carries in one direction, MB/s after encoding, by generation (PCI-SIG specifications).
var lanes = []int64{0, 250, 500, 985, 1969, 3938, 7563}

func pciBandwidth(generation, width int) int64 {
	if generation < 0 || generation >= len(lanes) {
		return 0
	}
	return lanes[generation] * int64(width)
}

// numaNode asks the kernel to which NUMA node of the host a PCI device is nearest; -1: it does not say. (NVML's own NUMA
// question is another one: it concerns GPUs that are nodes themselves.)
func numaNode(sys, busID string) int {
	domain, rest, ok := strings.Cut(strings.ToLower(busID), ":")
	if !ok || len(domain) < 4 {
		return -1
	}
	domain = domain[len(domain)-4:] // the kernel writes four digits, NVML eight
	b, err := os.ReadFile(filepath.Join(sys, "bus/pci/devices", domain+":"+rest, "numa_node"))
	if err != nil {
		return -1
	}
	node, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return -1
	}
	return node
}
