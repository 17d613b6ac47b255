package gpu

import "time"

// Stats is what one GPU or MIG slice does at one moment. A nil number means that it does not tell; slices tell little more
// than their memory.
type Stats struct {
	UUID           string
	Time           time.Time
	GPUPercent     *int64 // time with at least one kernel running, over the last sample period of the driver (1/6 to 1 s)
	MemoryPercent  *int64 // time with device memory being read or written, over the same period
	EncoderPercent *int64
	DecoderPercent *int64
	MemoryMiB      *int64 // total
	UsedMiB        *int64 // in use, the driver's own reserve included
	BAR1MiB        *int64
	BAR1UsedMiB    *int64
	TemperatureC   *int64
	PowerW         *int64
	PowerLimitW    *int64
	ECCL1          *int64 // corrected errors since the driver was loaded, as Nomad's plugin counts them
	ECCL2          *int64
	ECCMemory      *int64
	ECCUncorrected *int64 // all locations, since the driver was loaded
	Processes      []Process
}

// Process is one that computes on a GPU. The pid is the host's, so it can be matched to a task's tree.
type Process struct {
	PID     int
	UsedMiB int64 // -1: unknown
}

// StatValue is a statistic in the shape of Nomad's API (StatValue there).
type StatValue struct {
	IntNumeratorVal   *int64  `json:",omitempty"`
	IntDenominatorVal *int64  `json:",omitempty"`
	StringVal         *string `json:",omitempty"`
	Unit              string  `json:",omitempty"`
	Desc              string  `json:",omitempty"`
}

// notAvailable is what Nomad's plugin shows for a number that a GPU does not tell.
var notAvailable = "N/A"

// Summary is the statistic that stands for the device in short listings: its memory.
func (s Stats) Summary() StatValue {
	return ratio(s.UsedMiB, s.MemoryMiB, "MiB", "UsedMemory / TotalMemory")
}

// Values names the statistics as Nomad's NVIDIA plugin does, the last one excepted, which is ours.
func (s Stats) Values() map[string]StatValue {
	return map[string]StatValue{
		"Power usage":            ratio(s.PowerW, s.PowerLimitW, "W", "Power drawn by the GPU and its circuitry / its limit"),
		"GPU utilization":        value(s.GPUPercent, "%", "Time during which at least one kernel was running"),
		"Memory utilization":     value(s.MemoryPercent, "%", "Time during which device memory was being read or written"),
		"Encoder utilization":    value(s.EncoderPercent, "%", "Time during which the encoder was in use"),
		"Decoder utilization":    value(s.DecoderPercent, "%", "Time during which the decoder was in use"),
		"Temperature":            value(s.TemperatureC, "C", "Temperature of the GPU"),
		"Memory state":           s.Summary(),
		"BAR1 buffer state":      ratio(s.BAR1UsedMiB, s.BAR1MiB, "MiB", "UsedBAR1 / TotalBAR1"),
		"ECC L1 errors":          value(s.ECCL1, "#", "Corrected errors of the L1 cache"),
		"ECC L2 errors":          value(s.ECCL2, "#", "Corrected errors of the L2 cache"),
		"ECC memory errors":      value(s.ECCMemory, "#", "Corrected errors of the device memory"),
		"ECC uncorrected errors": value(s.ECCUncorrected, "#", "Errors that could not be corrected, anywhere on the GPU"),
	}
}

func value(n *int64, unit, desc string) StatValue {
	v := StatValue{IntNumeratorVal: n, Unit: unit, Desc: desc}
	if n == nil {
		v.StringVal = &notAvailable
	}
	return v
}

func ratio(n, of *int64, unit, desc string) StatValue {
	if n == nil || of == nil {
		return value(nil, unit, desc)
	}
	v := value(n, unit, desc)
	v.IntDenominatorVal = of
	return v
}
