//go:build cgo && linux

package gpu

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
)

// Fail enters a fault that was found before this source was opened.
func (n *nvmlSource) Fail(uuid, reason string) { n.ledger.fail(uuid, fault{reason: reason}) }

// Readmit ends the fault of a device.
func (n *nvmlSource) Readmit(uuid string) { n.ledger.heal(uuid) }

// SelfTest asks a GPU, for a MIG slice that which it is part of, what NVML can tell: it is still the same one, its memory
// can be read, it has counted no uncorrected error since it was last looked at, no row or page waits to be replaced or could not be, and
// the driver recommends no reset.
func (n *nvmlSource) SelfTest(uuid string) error {
	handles, err := n.current()
	if err != nil {
		return err
	}
	for _, h := range handles {
		if h.has(uuid) {
			return n.test(h)
		}
	}
	return errNoDevice
}

func (h handle) has(uuid string) bool {
	for _, s := range h.slices {
		if s.UUID == uuid {
			return true
		}
	}
	return h.uuid == uuid
}

func (n *nvmlSource) test(h handle) error {
	byIndex := func() (nvml.Device, nvml.Return) { return n.lib.DeviceGetHandleByIndex(h.index) } // a reset makes old ones void
	dev, ret := get(n, byIndex, "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex")
	if ret != nvml.SUCCESS {
		return n.failure(ret)
	}
	if uuid, ret := get(n, dev.GetUUID, "nvmlDeviceGetUUID"); ret != nvml.SUCCESS {
		return n.failure(ret)
	} else if uuid != h.uuid {
		return fmt.Errorf("GPU %s has taken its place", uuid)
	}
	if _, ret := get(n, dev.GetMemoryInfo, "nvmlDeviceGetMemoryInfo"); ret != nvml.SUCCESS {
		return fmt.Errorf("memory: %w", n.failure(ret))
	}
	if more, now, ok := n.counted(h.uuid, dev); ok && more > 0 {
		return fmt.Errorf("%d more uncorrected ECC errors, now %d", more, now)
	}
	if err := n.rows(dev); err != nil {
		return err
	}
	pages, ok := maybe(n, dev.GetRetiredPagesPendingStatus, "nvmlDeviceGetRetiredPagesPendingStatus")
	if ok && pages == nvml.FEATURE_ENABLED {
		return errors.New("memory pages wait to be retired: reset the GPU")
	}
	if action, ok := n.recovery(dev); ok && action != uint32(nvml.GPU_RECOVERY_ACTION_NONE) {
		return fmt.Errorf("the driver recommends %s", recoveryText(action))
	}
	return nil
}

// rows says what is wrong with the replacement of memory rows.
func (n *nvmlSource) rows(dev nvml.Device) error {
	type state struct{ pending, failed bool }
	remapped := func() (state, nvml.Return) {
		_, _, pending, failed, ret := dev.GetRemappedRows()
		return state{pending, failed}, ret
	}
	switch s, _ := maybe(n, remapped, "nvmlDeviceGetRemappedRows"); {
	case s.failed:
		return errors.New("the remapping of memory rows has failed: replace the GPU")
	case s.pending:
		return errors.New("memory rows wait to be remapped: reset the GPU")
	}
	return nil
}

// recovery asks for the action that the driver recommends, which those before 550 do not tell.
func (n *nvmlSource) recovery(dev nvml.Device) (action uint32, ok bool) {
	ask := func() (uint32, nvml.Return) {
		fields := []nvml.FieldValue{{FieldId: nvml.FI_DEV_GET_GPU_RECOVERY_ACTION}}
		if ret := dev.GetFieldValues(fields); ret != nvml.SUCCESS {
			return 0, ret
		}
		return binary.NativeEndian.Uint32(fields[0].Value[:]), nvml.Return(fields[0].NvmlReturn)
	}
	return maybe(n, ask, "nvmlDeviceGetFieldValues")
}

func recoveryText(action uint32) string {
	switch nvml.DeviceGpuRecoveryAction(action) {
	case nvml.GPU_RECOVERY_ACTION_GPU_RESET:
		return "to reset the GPU"
	case nvml.GPU_RECOVERY_ACTION_NODE_REBOOT:
		return "to reboot the node"
	case nvml.GPU_RECOVERY_ACTION_DRAIN_P2P, nvml.GPU_RECOVERY_ACTION_DRAIN_AND_RESET:
		return "to drain and reset the GPU"
	}
	return fmt.Sprintf("recovery action %d", action)
}

// counted gives by how much the uncorrected errors of a GPU have grown since they were counted last.
func (n *nvmlSource) counted(uuid string, dev nvml.Device) (more, now uint64, ok bool) {
	total := func() (uint64, nvml.Return) {
		return dev.GetTotalEccErrors(nvml.MEMORY_ERROR_TYPE_UNCORRECTED, nvml.VOLATILE_ECC)
	}
	if now, ok = maybe(n, total, "nvmlDeviceGetTotalEccErrors"); !ok {
		return 0, 0, false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	last, known := n.ecc[uuid]
	n.ecc[uuid] = now
	if known && now > last { // fewer: the driver was loaded anew
		more = now - last
	}
	return more, now, true
}

// count looks for errors that come without an event. Those of a GPU that is unhealthy already are for its self-test.
func (w *watcher) count(h handle) {
	if !w.ledger.health(h.uuid).Healthy {
		return
	}
	if more, now, ok := w.counted(h.uuid, h.dev); ok && more > 0 {
		w.ledger.fail(h.uuid, fault{reason: fmt.Sprintf("%d uncorrected ECC errors, %d of them new", now, more)})
	}
	remapped := func() (bool, nvml.Return) {
		_, _, _, failed, ret := h.dev.GetRemappedRows()
		return failed, ret
	}
	if f, _ := maybe(w.nvmlSource, remapped, "nvmlDeviceGetRemappedRows"); f {
		w.ledger.fail(h.uuid, fault{reason: "the remapping of memory rows has failed"})
	}
}
