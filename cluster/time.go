package cluster

import (
	"encoding/json"
	"fmt"
	"time"
)

// Time is a moment in nanoseconds since the Unix epoch; zero means "none". In
// JSON it is an RFC 3339 string with nanoseconds, or null for none, as Nomad's
// API writes its time.Time fields. Fields that Nomad's API gives as integers
// (CreateTime, SubmitTime…) are plain int64 nanoseconds instead.
type Time int64

// TimeOf converts t; the zero time.Time becomes 0.
func TimeOf(t time.Time) Time {
	if t.IsZero() {
		return 0
	}
	return Time(t.UnixNano())
}

// Std converts to a time.Time in UTC; 0 becomes the zero time.Time.
func (t Time) Std() time.Time {
	if t == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(t)).UTC()
}

// Add returns t moved by d.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

// MarshalJSON implements json.Marshaler.
func (t Time) MarshalJSON() ([]byte, error) {
	if t == 0 {
		return []byte("null"), nil
	}
	return t.Std().MarshalJSON()
}

// UnmarshalJSON implements json.Unmarshaler; it takes an RFC 3339 string or null.
func (t *Time) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*t = 0
		return nil
	}
	var std time.Time
	if err := json.Unmarshal(b, &std); err != nil {
		return fmt.Errorf("time %s: %w", b, err)
	}
	*t = TimeOf(std)
	return nil
}
