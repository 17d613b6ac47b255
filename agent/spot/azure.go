package spot

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// azure asks the Instance Metadata Service for scheduled events
// (https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events).
type azure struct{ metadata }

const (
	azureEvents   = "/metadata/scheduledevents?api-version=2020-07-01"
	azureInstance = "/metadata/instance/compute/%s?api-version=2021-02-01&format=text"
)

func (p *azure) get(ctx context.Context, path string) (string, error) {
	text, _, err := p.ask(ctx, http.MethodGet, path, "", askLimit, "Metadata", "true")
	return strings.TrimSpace(text), err
}

func (p *azure) Spot(ctx context.Context) (bool, error) {
	priority, err := p.get(ctx, fmt.Sprintf(azureInstance, "priority"))
	return strings.EqualFold(priority, "Spot"), err
}

func (p *azure) Watch(ctx context.Context, report func(*Notice)) {
	name := ""
	p.watch(ctx, report, func(ctx context.Context) (*Notice, error) {
		if name == "" {
			var err error
			if name, err = p.get(ctx, fmt.Sprintf(azureInstance, "name")); err != nil {
				return nil, err
			}
		}
		text, err := p.get(ctx, azureEvents)
		if err != nil {
			return nil, err
		}
		return eviction(text, name)
	})
}

// eviction finds the eviction of this machine among the events, which are those of a whole set. It is not approved: that
// would end the machine before its time, which its tasks need.
func eviction(text, name string) (*Notice, error) {
	var doc struct {
		Events []struct {
			EventType, NotBefore string
			Resources            []string
		}
	}
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		return nil, fmt.Errorf("scheduled events: %w", err)
	}
	for _, e := range doc.Events {
		if e.EventType != "Preempt" || !slices.Contains(e.Resources, name) {
			continue
		}
		n := &Notice{Reason: "Azure evicts the spot machine"}
		switch at, err := time.Parse(time.RFC1123, e.NotBefore); {
		case err == nil:
			n.At = at
		case e.NotBefore == "": // it has begun
			n.At = time.Unix(0, 1)
		default:
			return nil, fmt.Errorf("scheduled events: NotBefore %q: %w", e.NotBefore, err)
		}
		return n, nil
	}
	return nil, nil
}
