package spot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// aws asks the instance metadata service, version 2
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
type aws struct {
	metadata
	token   string
	expires time.Time
}

// tokenLife is how long a session token is asked for, in seconds.
const tokenLife = 21600

// get reads an item, with a token that is renewed in time, or when the service refuses it.
func (p *aws) get(ctx context.Context, path string) (string, error) {
	for fresh := false; ; fresh = true {
		if p.token == "" || time.Now().After(p.expires) {
			token, _, err := p.ask(ctx, http.MethodPut, "/latest/api/token", "", askLimit, "X-aws-ec2-metadata-token-ttl-seconds", fmt.Sprint(tokenLife))
			if err != nil {
				return "", err
			}
			p.token, p.expires, fresh = token, time.Now().Add(tokenLife/2*time.Second), true
		}
		text, _, err := p.ask(ctx, http.MethodGet, "/latest/meta-data/"+path, "", askLimit, "X-aws-ec2-metadata-token", p.token)
		var s statusError
		if fresh || !errors.As(err, &s) || s != http.StatusUnauthorized {
			return text, err
		}
		p.token = ""
	}
}

func (p *aws) Spot(ctx context.Context) (bool, error) {
	text, err := p.get(ctx, "instance-life-cycle")
	return strings.TrimSpace(text) == "spot", err
}

func (p *aws) Watch(ctx context.Context, report func(*Notice)) { p.watch(ctx, report, p.look) }

func (p *aws) look(ctx context.Context) (*Notice, error) {
	var action struct {
		Action string    `json:"action"` // terminate, stop or hibernate
		Time   time.Time `json:"time"`
	}
	text, err := p.get(ctx, "spot/instance-action")
	if err == nil {
		if err := json.Unmarshal([]byte(text), &action); err != nil {
			return nil, fmt.Errorf("spot/instance-action: %w", err)
		}
		return &Notice{Reason: "AWS takes the spot instance: " + action.Action, At: action.Time}, nil
	}
	if !absent(err) {
		return nil, err
	}
	if _, err = p.get(ctx, "events/recommendations/rebalance"); err == nil {
		return &Notice{Reason: "AWS recommends to leave the spot instance: it is at an elevated risk of interruption"}, nil
	}
	if absent(err) {
		err = nil
	}
	return nil, err
}
